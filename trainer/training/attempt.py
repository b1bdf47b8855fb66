"""One process start of a run: what both training loops do before, around and after their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

from trainer.config.length import num_steps
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import LaunchError, PreemptedError
from trainer.planning.identity import held_out_digest
from trainer.planning.plan import Plan
from trainer.run.console import Console
from trainer.run.directory import RunDir
from trainer.run.readers import HeldOut
from trainer.training.learner import Learner
from trainer.training.metrics import MetricsLog, Values, peak_gib
from trainer.training.no_gradient import NoGradientWarning
from trainer.training.open_learner import open_learner
from trainer.training.position import Position
from trainer.training.recovery import BadRows
from trainer.training.saver import Saver
from trainer.training.watchdog import Watchdog


@final
class Attempt:
    """The parts of an attempt, and the order in which a step uses them."""

    def __init__(self, plan: Plan, run: RunDir, world: World, number: int, stop: StopFlag) -> None:
        """Create the parts; nothing is read or written yet.

        Args:
            plan: what is trained.
            run: the run directory.
            world: the ranks.
            number: of this attempt, from 1.
            stop: the flag that a signal sets.
        """
        self.plan, self.run, self.world, self.number, self.stop = plan, run, world, number, stop
        self.console = Console(plan.steps) if world.is_main else None
        self.position = Position(stop)
        self.log = MetricsLog(run, number, plan, is_main=world.is_main, show=self._show, say=self.say)
        self.saver = Saver(plan, run, world, number, stop, self.position, self.say)
        self.no_gradient = NoGradientWarning(self.say)
        self.bad_rows = BadRows(run, world, plan.recipe.recovery.max_bad_steps, self.say)
        self.watchdog = Watchdog(
            run,
            number,
            world,
            stop,
            hang_timeout_s=plan.recipe.recovery.hang_timeout_s,
            position=self.position,
            say=self.say,
        )

    @property
    def step(self) -> int:
        """Steps made so far, over all attempts."""
        return self.position.step

    def server_log(self, number: int) -> Path:
        """File for the output of a server that this attempt starts."""
        return self.run.server_log(self.number, number)

    def say(self, text: str) -> None:
        """Print a message to the user, on the main rank."""
        if self.console is not None:
            self.console.say(text)

    def _show(self, record: Mapping[str, object]) -> None:
        if self.console is not None:
            self.console.show(record)

    def count_trained_rows(self, num_rows: int) -> None:
        """Set the length of a run given in epochs by the rows that are trained, without those that were dropped.

        Args:
            num_rows: rows that are trained; the same at every attempt.
        """
        if self.plan.recipe.epochs is None or num_rows == self.plan.num_rows:
            return
        steps = num_steps(self.plan.recipe, num_rows)
        assert steps is not None, "epochs of a known number of rows have a length"
        self.say(f"{num_rows:,} rows are trained: {steps:,} steps for {self.plan.recipe.epochs:g} epochs")
        self.plan = self.plan.model_copy(update={"steps": steps, "num_rows": num_rows})
        if self.world.is_main:
            self.run.write_plan(self.plan)
            if self.console is not None:
                self.console.steps = steps

    def open_learner(self) -> Learner:
        """Load, shard and verify the policy as the run begins; create its learner.

        Raises:
            ModelError: the model cannot be loaded or trained.
            NumericalError: a sequence alone is computed otherwise than by the model's own forward pass.
        """
        learner = open_learner(self.plan, self.world, self.stop)
        policy = learner.policy
        if policy.separate_reason is not None:
            self.say(f"sequences one by one: {policy.separate_reason}")
        if policy.left_out:
            self.say(f"layers without adapter: {', '.join(policy.left_out)} (the model does not call them as W x + b)")
        if self.world.is_main:
            self.run.note_attempt(self.number, {"sequences": policy.separate_reason or "packed"})
        return learner

    def resume(self, learner: Learner) -> None:
        """Load the newest valid checkpoint, if there is one, and drop the metrics of later steps.

        Raises:
            PreemptedError: a rank was asked to stop meanwhile.
            LaunchError: the checkpoint is of a later step than the last one of the plan.
        """
        saved_step = self.saver.load(learner)
        if saved_step is not None:
            if saved_step > self.plan.steps:
                raise LaunchError(
                    f"{self.run.root} is at step {saved_step} already; "
                    f"set `steps` to that or more (got {self.plan.steps})"
                )
            self.say(f"resumed {self.run.root} at step {saved_step} of {self.plan.steps}")
        self.bad_rows.load()
        if self.world.is_main:
            self._note_held_out(-1 if saved_step is None else saved_step)
        self.log.rewind(-1 if saved_step is None else saved_step)
        self.position.step = saved_step or 0
        self.position.enter("training")
        if self.stop.agreed(self.world) and self.step < self.plan.steps:
            raise PreemptedError(
                f"stopped at step {self.step} of {self.plan.steps}, before the next step; nothing is lost"
            )

    def _note_held_out(self, step: int) -> None:
        """Record which held-out rows are evaluated after `step`; values of replaced ones are not compared any more."""
        digest, before = held_out_digest(self.plan.recipe), self.run.read_held_out()
        if digest is None:
            return
        if before is None:
            self.run.write_held_out(HeldOut(digest, -1))
        elif before.digest != digest:
            self.run.write_held_out(HeldOut(digest, step))
            if step >= 0:
                self.say(
                    f"warning: the held-out rows were replaced: values up to step {step} count no more as the best"
                )
        elif step < before.since_step:  # it continues from an older checkpoint
            self.run.write_held_out(HeldOut(digest, step))

    def evaluate_at_start(self, learner: Learner, evaluate: Callable[[], Values]) -> None:
        """Log the held-out values before step 1, unless the run is resumed or has no held-out rows.

        Args:
            learner: has the weights.
            evaluate: computes the eval/ values.
        """
        if self.step == 0 and self.saver.saved_step is None and self.plan.recipe.data.eval is not None:
            self.log.write(0, self._evaluate(learner, evaluate))

    @contextmanager
    def abandonable(self, learner: Learner) -> Iterator[None]:
        """The part of a step that a stop may abandon.

        If nothing was updated yet, the state before the step is saved; else the last checkpoint counts.

        Raises:
            PreemptedError: the step was abandoned.
        """
        updates = learner.updates
        try:
            yield
        except PreemptedError as error:
            if learner.updates != updates:
                raise PreemptedError(f"{error}; the last checkpoint and the journal are the state") from None
            self.saver.begin(learner, must=True)
            raise PreemptedError(f"{error}; the state of step {self.step} of {self.plan.steps} is saved") from None

    def end_step(
        self, learner: Learner, values: Values, evaluate: Callable[[], Values], skipped_rows: Sequence[str]
    ) -> None:
        """Count the step and do the end-of-step work, in order: evaluate, log, save, stop.

        Args:
            learner: has made the updates of the step.
            values: what the step has measured.
            evaluate: computes the eval/ values.
            skipped_rows: file and line of the rows behind skipped updates.

        Raises:
            PreemptedError: a rank was asked to stop; the state is saved.
            RolledBackError: the run continues from its checkpoint without some rows.
            NumericalError: too many updates were skipped.
        """
        recipe = self.plan.recipe
        self.position.step += 1
        is_last = self.step == self.plan.steps
        if recipe.data.eval is not None and self._is_due(recipe.eval_interval):
            values |= self._evaluate(learner, evaluate)
        self.no_gradient.note(values)
        self.saver.collect(wait=False)
        self.log.write(
            self.step,
            values
            | self.saver.take_measured()
            | {"train/updates": learner.updates}
            | ({"train/skipped_rows": list(skipped_rows)} if skipped_rows else {}),
        )
        must_stop = self.stop.agreed(self.world)
        if must_stop or (recipe.dcp_save_interval and self._is_due(recipe.dcp_save_interval)):
            self.saver.begin(learner, must=must_stop)
        self.watchdog.beat()
        if skipped_rows:
            self.bad_rows.recover(self.step, self.saver)
        if must_stop and not is_last:
            raise PreemptedError(f"stopped after step {self.step} of {self.plan.steps}; the state is saved")

    def _is_due(self, interval: int) -> bool:
        """Whether this step is the last one, or a multiple of the interval; 0 means the last step only."""
        return self.step == self.plan.steps or (interval > 0 and self.step % interval == 0)

    def _evaluate(self, learner: Learner, evaluate: Callable[[], Values]) -> Values:
        """Held-out values; the weights are kept if they are the best so far."""
        with self.position.during("evaluating"):
            values = evaluate()
            self.saver.keep_if_best(learner, values)
        return values

    def performance(self, *, tokens: float, step_s: float) -> Values:
        """The perf/ values that both methods have.

        Args:
            tokens: that the step has trained on, over all ranks.
            step_s: duration of the step.
        """
        peak = max(self.world.max_of([peak_gib(self.world.device)]))
        values = {"perf/tokens_per_s": tokens / step_s, "perf/step_s": step_s, "perf/peak_gib": peak}
        return values | ({"perf/predicted_gib": self.plan.memory.total_gib} if self.plan.memory is not None else {})

    def finish(self, learner: Learner) -> None:
        """Write the last weights; wait for the last checkpoint and its upload."""
        self.saver.finish(learner)

    def close(self, exit_code: int) -> None:
        """Wait for a pending save and upload; end the tracker."""
        self.saver.close()
        self.log.close(exit_code)
