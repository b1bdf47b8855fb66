"""Connects a run with its judges: where answers are kept, when a wait ends, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from trainer.config.recipe import RFTRecipe
from trainer.config.reward_place import JUDGE_NAMES
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import PreemptedError
from trainer.rewards.judges.open import Judging
from trainer.rewards.judges.protocol import Surroundings
from trainer.run.directory import RunDir
from trainer.training.metrics import Values

STOPPED: Final = "stopped while a judge was awaited; what was sampled before is kept"


def open_judging(run: RunDir, world: World, stop: StopFlag, say: Callable[[str], None]) -> Judging:
    """What judges have of a run.

    Args:
        run: keeps their answers.
        world: the ranks.
        stop: is told that waiting is no hang.
        say: prints a message to the user.
    """

    def keep_waiting() -> None:
        """Not on several ranks: the others are not at a point at which all can stop; their grace period ends it."""
        stop.moved()
        if world.size == 1 and stop.reason is not None:
            raise PreemptedError(STOPPED)

    return Judging(run.judge_answers, Surroundings(say, keep_waiting))


def judge_metrics(recipe: RFTRecipe, judging: Judging, world: World) -> Values:
    """What judges cost since the last call, over all ranks; empty without judges."""
    if not any(spec.use in JUDGE_NAMES for spec in recipe.rewards):
        return {}
    counts = world.sum_by_name(judging.around.costs.take())
    return {f"perf/{name}": value for name, value in counts.items()}
