"""Reads the held-out answers that a run recorded. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from trainer.run.directory import RunDir


@final
@dataclass(frozen=True)
class EvaluatedPrompt:
    """A held-out prompt and its answers after one step."""

    key: tuple[str, int]
    """The same for the same prompt at another step or in another run; equal prompts are counted through."""
    where: str
    """Source of the row, file:line."""
    messages: Sequence[Mapping[str, Any]] | None
    """None in files of earlier versions."""
    fields: Mapping[str, Any]
    """The other fields of the row: the gold answer."""
    answers: Sequence[Mapping[str, Any]]
    """Each with `text`, `reward`, `rewards`, `finish_reason`, `num_tokens` and `failure`."""


def read_evaluation(run: RunDir, step: int) -> list[EvaluatedPrompt]:
    """The held-out answers after a step, in the order of the rows; empty where there are none.

    Args:
        run: any run.
        step: one of `run.evaluation_steps()`.
    """
    try:
        # not splitlines(): texts contain U+2028 and the like, which do not end a line of JSON
        lines = run.evaluation(step).read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    occurrences: Counter[str] = Counter()
    prompts = []
    for record in map(json.loads, lines):
        # earlier versions did not record the prompt: then file and line name the row
        asked = [record["prompt"], record["fields"]] if "prompt" in record else record["where"]
        text = json.dumps(asked, sort_keys=True)
        prompts.append(
            EvaluatedPrompt(
                key=(text, occurrences[text]),
                where=record["where"],
                messages=record.get("prompt"),
                fields=record.get("fields", {}),
                answers=record["answers"],
            )
        )
        occurrences[text] += 1
    return prompts
