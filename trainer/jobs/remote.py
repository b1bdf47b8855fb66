"""What launchers on machines elsewhere have in common: the command line of a run, and when it would be lost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.config.shape import TrainingShape
from trainer.errors import LaunchError
from trainer.jobs.slurm_script import SIGNALS
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.run.protocol import LAUNCHER, SHUTDOWN_TIMEOUT

PYTHON: Final = "python3"
"""The interpreter of the image or of the set-up commands."""
PORT: Final = 29500
"""Where the ranks of several nodes meet."""


@final
@dataclass(frozen=True)
class RemoteRun:
    """A run as the other machine starts it, from the recipe: it has no run directory at first."""

    plan: Plan
    recipe: Path
    """Relative to the working directory."""
    run: RunDir
    set: Sequence[str] = ()

    @classmethod
    def of(cls, plan: Plan, recipe: Path, run: RunDir, set: Sequence[str], directory: Path) -> RemoteRun:
        """The run of a recipe inside the project.

        Args:
            plan: of the recipe.
            recipe: as typed.
            run: where it would be.
            set: `--set` assignments.
            directory: the project, which goes to the other machine.

        Raises:
            LaunchError: the recipe is not part of the project.
        """
        absolute = recipe.resolve()
        if not absolute.is_relative_to(directory.resolve()):
            raise LaunchError(f"{recipe}: is outside of {directory}, which the other machine gets. Move it there.")
        return cls(plan, absolute.relative_to(directory.resolve()), run, set)

    def refuse_loss(self, remedy: str) -> None:
        """Stop where a killed machine would take the run with it.

        Args:
            remedy: what keeps it.

        Raises:
            LaunchError: nothing does.
        """
        if self.plan.recipe.checkpoint.mirror is None:
            raise LaunchError(f"checkpoint.mirror is not set: the run would be lost with its machine. {remedy}")
        if not self.plan.recipe.dcp_save_interval:
            raise LaunchError(
                "dcp_save_interval is 0: the run would be lost with its machine. Set it, for example to 20."
            )

    def arguments(self) -> str:
        """The recipe and what was said beside it, for a shell."""
        shape = ["--shape", self.plan.recipe.shape]
        words = [str(self.recipe), *(f"--set={each}" for each in self.set), *shape, "--name", self.run.name]
        return shlex.join(words)

    def command(self) -> str:
        """The supervisor, on one node."""
        return f"exec {PYTHON} -m trainer train {self.arguments()}"

    def command_of_node(self, rank: str, head: str, launcher: str) -> str:
        """Torchrun on one of several nodes; ends with the exit code of the run, which torchrun does not pass on.

        Args:
            rank: number of the node, as the shell finds it.
            head: address of node 0, as the shell finds it.
            launcher: noted in attempts.jsonl.
        """
        grace_s = math.ceil(self.plan.recipe.recovery.grace_period_s)
        shape, outcome = self.plan.shape, shlex.quote(str(self.run.outcome_file))
        return (
            f'grep -qs \'"state": "finished"\' {outcome} || rm -f {outcome}   # a later one is of this start\n'
            f"export {LAUNCHER}={launcher} {SHUTDOWN_TIMEOUT}={grace_s} PYTHONUNBUFFERED=1\n"
            f"{PYTHON} -m torch.distributed.run --nnodes {shape.nodes} --nproc-per-node {shape.ranks_per_node} \\\n"
            f"  --node-rank {rank} --master-addr {head} --master-port {PORT} \\\n"
            f"  --signals-to-handle {SIGNALS} --shutdown-timeout {grace_s} \\\n"
            f"  -m trainer.worker {self.arguments()} &\n"
            "step=$!\n"
            "trap 'kill -TERM $step' TERM\n"
            "while wait $step; code=$?; kill -0 $step 2>/dev/null; do :; done\n"
            f"said=$(sed -n 's/.*\"exit_code\": \\([0-9]*\\).*/\\1/p' {outcome} 2>/dev/null)\n"
            '[ "$code" = 0 ] || code=${said:-$code}\n'
            'exit "$code"\n'
        )


def gpus_of_node(shape: TrainingShape) -> int:
    """Number of devices of each node."""
    return shape.gpus // shape.nodes


def refuse_unknown(options: Mapping[str, str], known: Collection[str], flag: str) -> None:
    """Stop at a misspelt option.

    Args:
        options: as typed.
        known: names of all options.
        flag: where they were typed.

    Raises:
        LaunchError: there is one.
    """
    unknown = [name for name in options if name not in known]
    if unknown:
        raise LaunchError(f"{flag} {unknown[0]}: no such option. There are: {', '.join(sorted(known))}")
