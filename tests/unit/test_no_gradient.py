"""A run whose updates are all empty says so, at step 3 and at its end."""

from __future__ import annotations

import pytest

from trainer.training.no_gradient import NoGradientWarning, verdict

FLAT = {"train/grad_norm": 0.0, "train/tokens": 96.0, "rollout/flat_group_frac": 1.0}
EMPTY = {"train/tokens": 0.0, "train/learning_rate": 1e-4}
TRAINED = {"train/grad_norm": 0.5, "train/tokens": 96.0, "rollout/flat_group_frac": 0.5}


def said(*records: dict[str, float]) -> list[str]:
    texts: list[str] = []
    warning = NoGradientWarning(texts.append)
    for record in records:
        warning.note(record)
    return texts


@pytest.mark.parametrize(
    ("record", "reason"), [(FLAT, "earned the same reward"), (EMPTY, "all were cut at the token limit and masked")]
)
def test_three_empty_steps_in_a_row_are_said_once_with_the_likely_reason(record: dict[str, float], reason: str) -> None:
    assert said(record, record) == []
    (text,) = said(*[record] * 10)
    assert text.startswith("warning: the last 3 steps had no gradient")
    assert reason in text


def test_a_step_with_a_gradient_begins_the_count_again() -> None:
    assert said(FLAT, FLAT, TRAINED, FLAT, FLAT) == []
    assert said(FLAT, FLAT, {"train/skipped": 1.0, "train/tokens": 9.0}, FLAT, FLAT) == []


def test_the_verdict_is_of_the_whole_run() -> None:
    evaluated = {"step": 0, "eval/reward": 0.5}
    text = verdict([evaluated, *[FLAT] * 5])
    assert text is not None
    assert text.startswith("NOTHING WAS TRAINED: none of its 5 steps had a gradient. All completions")
    assert verdict([evaluated, *[FLAT] * 5, TRAINED]) is None
    assert verdict([evaluated]) is None
