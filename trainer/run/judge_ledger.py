"""What the judges of a run have cost so far, from the answers that it keeps. No torch."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import final

from trainer.run.directory import RunDir


@final
@dataclass(frozen=True)
class JudgeTotals:
    """Over all attempts and evaluations; answers of a cache elsewhere are not counted."""

    answers: int
    prompt_tokens: int
    completion_tokens: int

    def __str__(self) -> str:
        return (
            f"judges: {self.answers:,} answers for {self.prompt_tokens:,} prompt and {self.completion_tokens:,} "
            "completion tokens"
        )


def judge_totals(run: RunDir) -> JudgeTotals | None:
    """The totals; None where no judge has answered."""
    answers = prompt_tokens = completion_tokens = 0
    for file in sorted(run.judge_answers.glob("*.jsonl")):
        for line in file.read_text(encoding="ascii", errors="replace").split("\n"):
            with suppress(ValueError, KeyError, TypeError):  # a line cut off by a kill
                usage = json.loads(line)["usage"]
                answers += 1
                prompt_tokens += usage.get("prompt_tokens", 0)
                completion_tokens += usage.get("completion_tokens", 0)
    return JudgeTotals(answers, prompt_tokens, completion_tokens) if answers else None
