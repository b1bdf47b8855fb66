"""Reads the answers that a run recorded: to held-out prompts (rft), to a few rows (sft). No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """Each with `text`, `finish_reason` and `num_tokens`; of rft also `reward`, `rewards` and `failure`."""
    part: str = "held-out"
    """Which rows these are: held-out or training ones."""


def read_evaluation(run: RunDir, step: int) -> list[EvaluatedPrompt]:
    """The held-out answers after a step, in the order of the rows; empty where there are none.

    Args:
        run: any run.
        step: one of `run.evaluation_steps()`.
    """
    return _read(run.evaluation(step))


def read_answers(run: RunDir, step: int) -> list[EvaluatedPrompt]:
    """The answers of an sft run to a few rows after a step, in the order of the rows; empty where there are none.

    Args:
        run: any run.
        step: one of `run.answer_steps()`.
    """
    return _read(run.answers(step))


def _read(file: Path) -> list[EvaluatedPrompt]:
    try:
        # not splitlines(): texts contain U+2028 and the like, which do not end a line of JSON
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
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
                part=record.get("part", "held-out"),
            )
        )
        occurrences[text] += 1
    return prompts
