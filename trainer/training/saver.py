"""Saves a run: checkpoints to resume from, and the last and the best weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol, final

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from trainer.checkpoints.local import Checkpoints, TrainState
from trainer.checkpoints.mirror import Mirror
from trainer.checkpoints.uploader import Uploader
from trainer.data.chat import load_tokenizer
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import CheckpointError
from trainer.files import replaced_directory
from trainer.planning.plan import Plan
from trainer.run.best import best_value, is_best
from trainer.run.directory import RunDir
from trainer.training.learner import Learner
from trainer.training.metrics import Values
from trainer.training.position import Position

CLOSE_S: Final = 60.0
"""How long a failed attempt waits for a pending save, and for a pending upload."""


class TextState(Protocol):
    """State outside the learner, which is saved with each checkpoint."""

    def dump(self) -> str:
        """As text, the same on all ranks."""

    def restore(self, text: str | None) -> None:
        """Continue from what `dump` gave; None: the checkpoint has none."""


@final
class Saver:
    """Begins and collects the saves of this attempt."""

    def __init__(
        self,
        plan: Plan,
        run: RunDir,
        world: World,
        attempt: int,
        stop: StopFlag,
        position: Position,
        say: Callable[[str], None],
    ) -> None:
        """Open the checkpoints and, on the main rank, their mirror.

        Args:
            plan: the recipe says where the mirror is and how many checkpoints are kept.
            run: the run directory.
            world: the ranks.
            attempt: number of this process start.
            stop: is told how long a save takes.
            position: the step that is saved.
            say: prints a message to the user.
        """
        self.plan, self.run, self.world, self.stop, self.position, self.say = plan, run, world, stop, position, say
        has_mirror = world.is_main and plan.recipe.checkpoint.mirror is not None
        self.uploader = Uploader(self._open_mirror if has_mirror else None, say)
        self.checkpoints = Checkpoints(run, plan.recipe, plan.identity_hash, world, attempt, self.uploader)
        self.saved_step: int | None = None
        """Step of the newest checkpoint; None if there is none."""
        self.texts: dict[str, TextState] = {}
        """By the name of its file in a checkpoint; set before `load`."""
        self._measured: Values = {}

    def load(self, learner: Learner) -> int | None:
        """Load the newest checkpoint into the learner; every rank calls this.

        Returns:
            Its step; None if there is no checkpoint.
        """
        state = self.checkpoints.load_newest(learner.state_tensors(), self.texts)
        if state is None:
            return None
        for name, text_state in self.texts.items():
            text_state.restore(state.texts.get(name))
        learner.restore(updates=int(state.counters.get("updates", 0)))
        self.saved_step = state.step
        return state.step

    def begin(self, learner: Learner, *, must: bool) -> None:
        """Begin to save the current step, unless it is saved; the training goes on while files are written.

        Args:
            learner: has the tensors.
            must: wait for the end of the save, and raise if it failed.

        Raises:
            CheckpointError: `must`, and the checkpoint could not be written.
        """
        start = time.perf_counter()
        with self.position.during("saving"):
            self.collect(wait=True)
            if self.saved_step == self.position.step:
                return
            texts = {name: text_state.dump() for name, text_state in self.texts.items()}
            state = TrainState(self.position.step, {"updates": learner.updates}, texts)
            best = best_value(self.run.comparable_metrics()) if self.world.is_main else None
            self.checkpoints.begin(state, learner.state_tensors(), keep=None if best is None else best.step)
            self._measured["perf/save_s"] = time.perf_counter() - start
            problem = self.collect(wait=True) if must else None
            if problem is not None:
                raise CheckpointError(problem)

    def collect(self, *, wait: bool) -> str | None:
        """Take the result of the pending save, if it is done or awaited.

        Returns:
            Why it failed; None if it succeeded, or there is no result yet.
        """
        saved = self.checkpoints.collect(wait=wait)
        if saved is None:
            return None
        self.stop.note_save(saved.seconds)
        if saved.problem is None:
            self.saved_step = saved.step
            return None
        self._measured["perf/failed_saves"] = self._measured.get("perf/failed_saves", 0.0) + 1.0
        self.say(f"warning: {saved.problem}; going on, the next save tries again")
        return saved.problem

    def take_measured(self) -> Values:
        """The perf/ values of saves since the last call."""
        measured, self._measured = self._measured, {}
        return measured

    def keep_if_best(self, learner: Learner, values: Values) -> None:
        """Save the weights as the best ones if the held-out values of this step are the best so far.

        Args:
            learner: has the weights.
            values: held-out values of the current step, not yet in metrics.jsonl.
        """
        is_to_keep = self.world.is_main and is_best(self.position.step, values, self.run.comparable_metrics())
        if self.world.from_main(is_to_keep):
            self.save_weights(learner, best=True)

    def save_weights(self, learner: Learner, *, best: bool = False) -> Path:
        """Replace adapter/ or model/ (or the -best one) as a whole; every rank calls this.

        Args:
            learner: has the weights.
            best: whether these are the best weights so far, not the last.

        Raises:
            CheckpointError: it could not be written; the previous one is intact.
        """
        target = self.run.weights(is_lora=self.plan.recipe.lora is not None, best=best)
        masters = learner.whole_masters()
        if not self.world.is_main:
            return target
        try:
            with replaced_directory(target) as directory:
                learner.policy.save(directory, masters)
                self._tokenizer.save_pretrained(str(directory))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{target}: not written: {error}") from None
        return target

    def finish(self, learner: Learner) -> None:
        """Write the last weights; wait for the last checkpoint and its upload."""
        self.say(f"weights: {self.save_weights(learner)}")
        self.collect(wait=True)
        self.uploader.close(float("inf"))

    def close(self) -> None:
        """Wait for a pending save and upload, so that a failure elsewhere does not lose them."""
        timeout_s = min(CLOSE_S, self.stop.grace_s)
        self.checkpoints.close(timeout_s)
        self.uploader.close(timeout_s)

    def _open_mirror(self) -> Mirror:
        address, keep_last = self.plan.recipe.checkpoint.mirror, self.plan.recipe.keep_last
        assert address is not None
        return Mirror(address, self.run, self.plan.identity_hash, keep_last=keep_last)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.plan.recipe.model)
