"""Completion tokens/s of the local sampler and of `model.generate`: same model, prompts and lengths, alternating.

    python benchmarks/sampling.py [--rounds 3] [--tokens 128] [--clock wall|cpu]

Ours samples from a policy with a LoRA adapter of rank 16 on all linear layers, as training does, with the same adapter
published again before each round. `model.generate` runs with bfloat16 weights and SDPA, do_sample at temperature 1
without truncation, `num_return_sequences`, left padding; once without adapter (less work than ours)
and once with the adapter by PEFT. `fixed` draws equally many tokens in every row; `stop` lets rows end at a stop token
and does not count padding. `--clock cpu` measures CPU time, for a shared machine: run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import peft
import torch
from machine import conditions
from transformers import AutoModelForCausalLM

from trainer.config.recipe import DataSettings, DataSource, LoraSettings, ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.model.policy import load_policy
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SampleRequest, SamplingParams

MODEL = "models/SmolLM2-135M-Instruct"
ROWS = "datasets/sums_train.jsonl"
GROUP_SIZE = 8
NUM_PROMPTS = {8: 1, 32: 4}
CPU = torch.device("cpu")
OURS, PLAIN, ADAPTED = "tunesmith", "generate, no adapter", "generate, PEFT adapter"

Run = Callable[[int, str, int], int]
"""Number of sequences, `fixed` or `stop`, round -> completion tokens."""


class Prompts:
    """The prompts of a benchmark."""

    def __init__(self) -> None:
        self.settings, data = ModelSettings(path=MODEL), DataSettings(train=DataSource(path=ROWS))
        self.tokenizer = load_tokenizer(self.settings)
        self.encoder = ChatEncoder(self.tokenizer, self.settings, data, for_prompts=True)
        rows = list(read_rows(data.train, data))
        spread = [rows[number * len(rows) // 4] for number in range(4)]
        self.ids = [self.encoder.encode_prompt(row) for row in spread]


def ours(prompts: Prompts, tokens: int) -> Run:
    """Our sampler on a policy with an adapter."""
    policy = load_policy(prompts.settings, LoraSettings(rank=16), 0, CPU)
    sampler = LocalSampler(policy, prompts.tokenizer)

    def run(num: int, kind: str, step: int) -> int:
        sampler.publish(policy, step)
        params = SamplingParams(tokens, prompts.encoder.stop_ids if kind == "stop" else frozenset(), 0, step)
        requests = [SampleRequest(ids, row, GROUP_SIZE) for row, ids in enumerate(prompts.ids[: NUM_PROMPTS[num]])]
        return sum(len(answer.token_ids) for group in sampler.sample(requests, params) for answer in group)

    return run


def generate(prompts: Prompts, tokens: int, *, has_adapter: bool) -> Run:
    """`model.generate` as commonly used."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    if has_adapter:
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora).eval()
    stop_ids = sorted(prompts.encoder.stop_ids)

    def run(num: int, kind: str, step: int) -> int:
        torch.manual_seed(step)
        model.generation_config.eos_token_id = stop_ids if kind == "stop" else None
        batch = prompts.tokenizer.pad(
            {"input_ids": [list(ids) for ids in prompts.ids[: NUM_PROMPTS[num]]]},
            padding_side="left", return_tensors="pt",
        )  # fmt: skip
        out = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens,
            num_return_sequences=GROUP_SIZE, pad_token_id=stop_ids[0],
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        if kind == "fixed":
            return int(out.numel())
        is_stop = torch.isin(out, torch.tensor(stop_ids))
        first = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, out.shape[1])
        return int(first.sum())

    return run


def main() -> None:
    """Alternate, and write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", default="benchmarks/results/sampling")
    arguments = parser.parse_args()
    common.quiet()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    prompts = Prompts()
    runs = {
        OURS: ours(prompts, arguments.tokens),
        PLAIN: generate(prompts, arguments.tokens, has_adapter=False),
        ADAPTED: generate(prompts, arguments.tokens, has_adapter=True),
    }
    rates: dict[str, dict[str, list[float]]] = {}
    for kind in ("fixed", "stop"):
        for num in NUM_PROMPTS:
            found = rates.setdefault(f"{num} sequences, {kind}", {name: [] for name in runs})
            for step in range(arguments.rounds):
                for name in runs if step % 2 == 0 else reversed(runs):
                    begin = clock()
                    drawn = runs[name](num, kind, step)
                    found[name].append(drawn / (clock() - begin))
                    print(f"{num} {kind} {name}: {found[name][-1]:.0f} tokens/s", flush=True)
    report(Path(arguments.out), rates, prompts, arguments)


def report(
    out: Path, rates: dict[str, dict[str, list[float]]], prompts: Prompts, arguments: argparse.Namespace
) -> None:
    """Write JSON and Markdown."""
    medians = {case: {name: statistics.median(found) for name, found in by.items()} for case, by in rates.items()}
    result = {
        "conditions": conditions(), "model": "SmolLM2-135M-Instruct", "group_size": GROUP_SIZE,
        "prompt_tokens": [len(ids) for ids in prompts.ids], "max_completion_tokens": arguments.tokens,
        "clock": arguments.clock, "rounds": arguments.rounds, "tokens_per_s": medians, "all": rates,
        "ratios": {
            case: {name: round(by[OURS] / by[name], 2) for name in by if name != OURS} for case, by in medians.items()
        },
    }  # fmt: skip
    env = result["conditions"]
    lines = [
        f"Sampling from SmolLM2-135M-Instruct, prompts of {result['prompt_tokens']} tokens, {arguments.tokens} drawn,",
        f"groups of {GROUP_SIZE}; medians of {arguments.rounds} alternating rounds, {arguments.clock} clock.",
        f"{env['processor']}, {env['threads']} threads, AMX {env['amx']}, load {env['load_average'][0]},",
        f"torch {env['torch']}, transformers {env['transformers']}; bf16 matrix peak",
        f"{env['bf16_peak_gflops']} GFLOP/s; {env['date']}.\n",
        f"| completion tokens/s | {OURS} (adapter) | {PLAIN} | {ADAPTED} | ratios |\n|---|---:|---:|---:|---:|",
        *(
            f"| {case} | {by[OURS]:.0f} | {by[PLAIN]:.0f} | {by[ADAPTED]:.0f} "
            f"| {by[OURS] / by[PLAIN]:.1f}x, {by[OURS] / by[ADAPTED]:.1f}x |"
            for case, by in medians.items()
        ),
    ]
    common.write_result(out, result, lines)


if __name__ == "__main__":
    main()
