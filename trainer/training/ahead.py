"""Where the loop of rft gets its rollouts: drawn with the present policy, or one step ahead while it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Protocol, final

from trainer.errors import PreemptedError
from trainer.training.group_sampler import GroupRequest
from trainer.training.metrics import Values
from trainer.training.rollouts import OpenChunk, Rollouts, StepRollouts, split_chunks
from trainer.types import Group

Publish = Callable[[int], None]
"""Gives the sampler the present weights, as those of a step."""


class RolloutSource(Protocol):
    """The rollouts of each step, in order."""

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts that a step trains on; the policy is the one before its updates."""

    def settle(self) -> None:
        """After the updates of a step, before it is saved."""

    def measured(self, drawn: StepRollouts) -> Values:
        """Metrics of the step that only this source has."""


@contextmanager
def rollout_source(
    rollouts: Rollouts, publish: Publish, steps: int, say: Callable[[str], None], rest: Callable[[], None]
) -> Iterator[RolloutSource]:
    """The source that `rollout.staleness` asks for.

    Args:
        rollouts: samples and replays chunks.
        publish: called before anything is drawn.
        steps: of the run.
        say: tells the user what cannot be replayed.
        rest: called when a step is drawn, before the policy learns.
    """
    if not rollouts.settings.staleness:
        yield PresentRollouts(rollouts, publish, rest)
        return
    if rollouts.settings.sampler == "local":  # it draws with the weights that learn, so not beside the learner
        yield RolloutsAhead(rollouts, publish, steps, say, None)
        return
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        yield RolloutsAhead(rollouts, publish, steps, say, thread)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


@final
class PresentRollouts:
    """Every step is drawn with the policy that it trains."""

    def __init__(self, rollouts: Rollouts, publish: Publish, rest: Callable[[], None]) -> None:
        """Keep them."""
        self._rollouts, self._publish, self._rest = rollouts, publish, rest
        self._drawn: StepRollouts | None = None

    def of_step(self, step: int) -> StepRollouts:
        """Publish, draw, then let the sampler rest."""
        self._publish(step)
        self._drawn = self._rollouts.of_step(step)
        self._rest()
        return self._drawn

    def settle(self) -> None:
        """Remember for `refill` what the step has shown."""
        assert self._drawn is not None, "a step was drawn"
        self._rollouts.remember(self._drawn)

    def measured(self, drawn: StepRollouts) -> Values:
        """Those of `refill`."""
        return self._rollouts.measured(drawn)


@final
class RolloutsAhead:
    """Step n + 1 is drawn with the policy before step n's updates: on a server while they are made, scored meanwhile.

    What step n + 1 trains on is in the journal before step n is saved, so a resumed run replays it; the weights that
    drew it are gone by then. Step 0 is drawn with the policy that it trains.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        publish: Publish,
        steps: int,
        say: Callable[[str], None],
        thread: ThreadPoolExecutor | None,
    ) -> None:
        """Begin without open steps.

        Args:
            rollouts: samples and replays chunks.
            publish: called before a step is drawn.
            steps: of the run.
            say: tells the user what cannot be replayed.
            thread: draws beside the learner; None draws before it learns, so that only the rewards are beside it.
        """
        self._rollouts, self._publish, self._steps, self._say, self._thread = rollouts, publish, steps, say, thread
        self._world = rollouts.world
        self._open: dict[int, _OpenStep] = {}
        self._ready: dict[int, StepRollouts] = {}

    def of_step(self, step: int) -> StepRollouts:
        """The rollouts of a step; those of the next one are begun.

        Raises:
            PreemptedError: a stop was requested; chunks written so far are kept.
            RewardError: too many rollouts have no reward.
        """
        if step not in self._ready:
            self._begin(step)
            self._finish(step)
            self._say_what_was_lost(step)
        drawn = self._ready.pop(step)
        if step + 1 < self._steps:
            self._begin(step + 1, step)
        return drawn

    def settle(self) -> None:
        """Wait for the rollouts of the next step and write them to the journal."""
        for step in list(self._open):
            self._finish(step)

    def measured(self, drawn: StepRollouts) -> Values:
        """Mean of the steps whose policies drew the rollouts."""
        versions = [rollout.policy_version for group in drawn.sampled for rollout in group.rollouts]
        total, count = self._world.sum_of([float(sum(versions)), float(len(versions))])
        return {"rollout/policy_version": total / count}

    def _begin(self, step: int, version: int | None = None) -> None:
        """Publish the present weights and draw a step with them."""
        self._publish(step if version is None else version)
        rollouts = self._rollouts
        chosen = list(islice(rollouts.candidates(step), rollouts.recipe.rows_per_step))
        chunks = list(split_chunks(chosen, rollouts.settings.chunk_prompts, self._world.size))
        opened: list[Future[OpenChunk]] = []
        for begin in range(0, len(chunks), self._world.size):
            number = begin + self._world.rank
            if number < len(chunks):
                requests = [candidate.request for candidate in chunks[number]]
                opened.append(self._draw(step, number, requests))
            if self._thread is None and rollouts.stop.agreed(self._world):
                for each in opened:
                    rollouts.close_chunk(each.result())
                raise PreemptedError(f"stopped while sampling step {step + 1}; what was sampled is kept")
        mine = [candidate.position for chunk in chunks[self._world.rank :: self._world.size] for candidate in chunk]
        self._open[step] = _OpenStep(opened, mine, -(-len(chunks) // self._world.size))

    def _draw(self, step: int, number: int, requests: Sequence[GroupRequest]) -> Future[OpenChunk]:
        act = partial(self._rollouts.open_chunk, step, number, requests)
        if self._thread is not None:
            return self._thread.submit(act)
        done: Future[OpenChunk] = Future()
        done.set_result(act())
        return done

    def _finish(self, step: int) -> None:
        """Wait for a step's chunks and rewards."""
        opened, rollouts = self._open.pop(step), self._rollouts
        groups: list[Group] = []
        num_replayed = 0
        for number in range(opened.num_rounds):  # the same on all ranks, which agree on stopping
            if number < len(opened.chunks):
                chunk = opened.chunks[number].result()
                num_replayed += chunk.recorded is not None
                groups += rollouts.close_chunk(chunk)
            if rollouts.stop.agreed(self._world) and number + 1 < opened.num_rounds:
                raise PreemptedError(f"stopped while sampling step {step + 1}; what was sampled is kept")
        rollouts.refuse_failures(step, groups)
        everywhere = sorted(position for positions in self._world.gather(opened.positions) for position in positions)
        positions = tuple(everywhere.index(position) for position in opened.positions)
        self._ready[step] = StepRollouts(tuple(groups), positions, tuple(groups), num_replayed)

    def _say_what_was_lost(self, step: int) -> None:
        """After a resume the journal has the step's rollouts, unless its files are gone or the run was lengthened."""
        groups = self._ready[step].sampled
        late = sum(rollout.policy_version == step for group in groups for rollout in group.rollouts)
        (total,) = self._world.sum_of([float(late)])
        if step and total:
            self._say(
                f"warning: {total:.0f} rollouts of step {step + 1} are not in the journal; they are drawn with the "
                f"policy of step {step}, not of step {step - 1} as `rollout.staleness: 1` says"
            )


@final
class _OpenStep:
    """A step that is being drawn."""

    def __init__(self, chunks: list[Future[OpenChunk]], positions: list[int], num_rounds: int) -> None:
        """Keep what `_finish` needs.

        Args:
            chunks: of this rank, in order.
            positions: of this rank's groups among the candidates of the step.
            num_rounds: most chunks of a rank.
        """
        self.chunks, self.positions, self.num_rounds = chunks, positions, num_rounds
