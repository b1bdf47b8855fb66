"""Delete a run that is not live."""

from __future__ import annotations

import shutil

from trainer.errors import LaunchError
from trainer.jobs.state import observe
from trainer.run.directory import RunDir


def delete_run(run: RunDir) -> None:
    """Delete the run directory with its checkpoints, weights and exports. Copies on a mirror stay.

    Raises:
        LaunchError: the run is live.
        QueueError: Slurm could not be asked whether it is.
    """
    state = observe(run)
    if state.is_live:
        raise LaunchError(f"{run.root} is {state.job.lower()}; stop it first: trainer cancel {run.root}")
    with run.launching(), run.supervised(), run.locked():
        root = run.root.resolve()
        retired = RunDir(root.with_name(f".{root.name}.deleted"))
        shutil.rmtree(retired.root, ignore_errors=True)
        root.rename(retired.root)  # at once: nobody opens a run of which half is gone
        retired.plan_file.unlink()
        if run.root.is_symlink():
            run.root.unlink()
    shutil.rmtree(retired.root)
