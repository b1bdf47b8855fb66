"""Speculative decoding by prompt look-up, one client: JSON that repeats its prompt, and prose that does not.

    python benchmarks/speculation.py --model models/SmolLM2-135M-Instruct [--rounds 3] [--tokens 200]
        [--dtype bfloat16] [--only json,prose] [--draft-model DIR]

The engine itself with and without proposals, in turn; tokens per CPU-second of the steps, steps, and whether the tokens
are equal. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

from trainer.config.recipe import ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.engine.draft import Drafter
from trainer.engine.model import EngineModel
from trainer.engine.protocol import Sampling
from trainer.engine.scheduler import Counters, Scheduler
from trainer.engine.sequences import LiveSequence

ORDERS = [
    {
        "customer": "Ann Lee",
        "item": "green tea",
        "boxes": 3,
        "city": "Oslo",
        "paid": True,
        "note": "call before delivery",
    },
    {
        "customer": "Bo Sand",
        "item": "black tea",
        "boxes": 7,
        "city": "Rome",
        "paid": False,
        "note": "leave at the door",
    },
    {"customer": "Cy Holm", "item": "coffee", "boxes": 12, "city": "Lima", "paid": True, "note": "second floor, left"},
]


def prompts(tokenizer: Any) -> dict[str, list[int]]:
    """Token ids by name: JSON of which a copy has begun, and a question."""
    text = json.dumps(ORDERS, indent=1)
    chat = [{"role": "user", "content": "Tell me about the history of tea in Europe."}]
    return {
        "json": tokenizer(f"The orders:\n{text}\n\nThe same orders again:\n{text[:60]}")["input_ids"],
        "prose": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--only", default="json,prose")
    parser.add_argument("--draft-model", help="proposes where prompt look-up finds nothing")
    arguments = parser.parse_args()
    settings = ModelSettings(path=arguments.model, compute_dtype=arguments.dtype)
    tokenizer, model = load_tokenizer(settings), EngineModel(settings, 8)

    draft = None
    if arguments.draft_model is not None:
        draft = EngineModel(ModelSettings(path=arguments.draft_model, compute_dtype=arguments.dtype), 1)

    def run(ids: list[int], temperature: float, *, speculates: bool) -> tuple[list[int], float, Counters]:
        drafter = None if draft is None else Drafter(draft, 64, model.vocab_size)
        scheduler = Scheduler(model, model.pool(64), speculates=speculates, drafter=drafter)
        how = Sampling(
            max_tokens=arguments.tokens, seed=1, temperature=temperature, stop_ids=(int(tokenizer.eos_token_id),)
        )
        row = LiveSequence("a", tuple(ids), how, None)
        scheduler.add(row)
        while not row.drawn:
            scheduler.step()
        begin, count = time.process_time(), len(row.drawn)
        while not scheduler.is_idle:
            scheduler.step()
        return row.drawn, (len(row.drawn) - count) / (time.process_time() - begin), scheduler.counters

    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "dtype": arguments.dtype, "load": os.getloadavg()[0]}
    for name, ids in prompts(tokenizer).items():
        if name not in arguments.only.split(","):
            continue
        for temperature in (0.0, 1.0):
            ratios, is_equal, counters = [], True, Counters()
            for _ in range(arguments.rounds):
                expected, plain, _ = run(ids, temperature, speculates=False)
                drawn, fast, counters = run(ids, temperature, speculates=True)
                ratios.append(fast / plain)
                is_equal &= drawn == expected
            found[f"{name}, temperature {temperature:g}"] = {
                "gain": round(statistics.median(ratios), 2),
                "tokens": len(drawn),
                "steps": counters.steps,
                "proposed": counters.proposed_tokens,
                "accepted": counters.accepted_tokens,
                "tokens_equal": is_equal,
                "begins": tokenizer.decode(drawn[:12]),
            }
            print(name, temperature, found[f"{name}, temperature {temperature:g}"], file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
