"""Says when the steps of a run have trained nothing: no update had a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

WARN_AFTER: Final = 3
"""Steps without a gradient after which the user is told."""
GRADIENT: Final = "train/grad_norm"
TOKENS: Final = "train/tokens"


def has_gradient(record: Mapping[str, Any]) -> bool:
    """Whether a step's metrics show an update with a gradient, or one that was skipped for its numbers.

    >>> has_gradient({"train/grad_norm": 0.0, "train/tokens": 96.0}), has_gradient({"train/tokens": 0.0})
    (False, False)
    """
    return bool(record.get("train/skipped")) or record.get(GRADIENT, 0.0) > 0.0


def verdict(records: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say at the end of a run whose updates were all empty; None where one had a gradient.

    Args:
        records: the run's metrics, in order; those without a step of training are ignored.
    """
    steps = [record for record in records if TOKENS in record]
    if not steps or any(map(has_gradient, steps)):
        return None
    return f"NOTHING WAS TRAINED: none of its {len(steps)} steps had a gradient. {_reason(steps)}"


@final
class NoGradientWarning:
    """Warns once, after some steps in a row without a gradient."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Count from here.

        Args:
            say: prints a message to the user.
        """
        self._say = say
        self._steps: list[Mapping[str, Any]] = []

    def note(self, record: Mapping[str, Any]) -> None:
        """Take note of a step's metrics."""
        if has_gradient(record):
            self._steps = []
            return
        self._steps.append(record)
        if len(self._steps) == WARN_AFTER:
            self._say(
                f"warning: the last {WARN_AFTER} steps had no gradient, so they trained nothing. {_reason(self._steps)}"
            )


def _reason(steps: Sequence[Mapping[str, Any]]) -> str:
    """The likely cause, from the metrics of the steps."""
    if not any(step.get(TOKENS) for step in steps):
        return "No completion was trained: all failed, or all were cut at the token limit and masked."
    if all(step.get("rollout/flat_group_frac") == 1.0 for step in steps):
        return (
            "All completions of each prompt earned the same reward. Check the reward with `trainer check --rewards`, "
            "give easier prompts, or train on demonstrations first."
        )
    return "The loss does not depend on the trained parameters."
