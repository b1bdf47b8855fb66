"""Structured output at temperature 1.2: every finished answer must be valid, every other schema refused by name.

    python benchmarks/structured_output.py --model DIR [--samples 200] [--max-tokens 400]

The schemas of structured_schemas.py, continued by the engine itself (embedded, one process). A model with random
weights is the hardest case: it follows nothing but the grammar. Prints one JSON document; ends with 1 where an answer
is invalid, a schema is refused that should not be, or one is accepted that nobody can guarantee.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from typing import Any

import jsonschema
from structured_schemas import GUARANTEED, REFUSED

from trainer.config.recipe import ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.engine.grammar import Grammars
from trainer.engine.model import EngineModel
from trainer.engine.protocol import Sampling
from trainer.engine.scheduler import Scheduler
from trainer.engine.sequences import LiveSequence
from trainer.serve.api_errors import ApiError
from trainer.serve.structure import json_grammar, lark, schema_rules

PROMPT = "Write JSON:"
PAGES = 2048


class Sampler:
    """Draws texts of a schema."""

    def __init__(self, path: str) -> None:
        settings = ModelSettings(path=path, compute_dtype="float32")
        self.tokenizer = load_tokenizer(settings)
        self._model = EngineModel(settings, 8)
        self._stop = int(self.tokenizer.eos_token_id)
        self._grammars = Grammars(self.tokenizer, self._model.vocab_size, [self._stop])

    def texts(
        self, schema: dict[str, Any], samples: int, max_tokens: int, temperature: float = 1.2
    ) -> list[str | None]:
        """One text for each sample; None where it is not finished in time."""
        json_grammar(schema)
        grammar = lark(schema_rules(schema), self.tokenizer.get_added_vocab())
        scheduler = Scheduler(self._model, self._model.pool(PAGES))
        prompt = tuple(self.tokenizer(PROMPT)["input_ids"])
        how = {"max_tokens": max_tokens, "seed": 0, "temperature": temperature, "stop_ids": (self._stop,)}
        rows = []
        for index in range(samples):
            sampling = Sampling(**how, sample=index)  # type: ignore[arg-type]
            rows.append(LiveSequence(str(index), prompt, sampling, None, self._grammars.matcher(grammar)))
            scheduler.add(rows[-1])
        reasons: dict[str, str] = {}
        while not scheduler.is_idle:
            for row, reason, error in scheduler.step().ended:
                assert reason != "error", error
                reasons[row.id] = reason
        decode = self.tokenizer.decode
        return [decode(row.drawn, skip_special_tokens=True) if reasons[row.id] == "stop" else None for row in rows]


def problem_of(schema: dict[str, Any], text: str) -> str | None:
    """Why a text is not valid; None if it is."""
    kind = jsonschema.Draft202012Validator
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error).splitlines()[0]}"
    return None


def main() -> int:
    """Run all schemas."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=400)
    arguments = parser.parse_args()
    sampler, total = Sampler(arguments.model), Counter[str]()
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "model": arguments.model, "wrong": []}
    for name, schema in GUARANTEED.items():
        try:
            texts = sampler.texts(schema, arguments.samples, arguments.max_tokens)
        except ApiError as error:
            found["wrong"].append(f"{name}: refused: {error.message}")
            continue
        finished = [text for text in texts if text is not None]
        problems = [problem for text in finished if (problem := problem_of(schema, text))]
        total.update(drawn=len(texts), finished=len(finished), invalid=len(problems), distinct=len(set(finished)))
        found["wrong"] += [f"{name}: {problem}" for problem in problems[:3]]
        print(f"{name}: {len(finished)} finished, {len(problems)} invalid", file=sys.stderr, flush=True)
    for name, schema in REFUSED.items():
        try:
            json_grammar(schema)
            found["wrong"].append(f"{name}: not refused")
        except ApiError as error:
            if name not in error.message:
                found["wrong"].append(f"{name}: refused without its name: {error.message}")
    found |= {"schemas": len(GUARANTEED), "refused": len(REFUSED), **total}
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
