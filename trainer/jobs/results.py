"""What a run has produced, for scripts: metrics as they come, weights, an exported model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from trainer.errors import EXIT_USER, LaunchError, TrainerError, UserError
from trainer.jobs.logs import is_live
from trainer.run.directory import RunDir
from trainer.run.metrics_reader import Record

GgufKind = Literal["bf16", "f16", "q8_0"]


def metric_records(run: RunDir, *, follow: bool, poll_s: float) -> Iterator[Record]:
    """Yield the records of metrics.jsonl.

    Args:
        run: any run.
        follow: go on with new records until the run ends.
        poll_s: seconds between two looks.
    """
    if not follow:
        yield from run.read_metrics()
        return
    reader = run.metrics_reader(last=sys.maxsize)
    while True:
        has_ended = not is_live(run)  # before the read: what is written later is read in the next round
        yield from reader.poll()
        if has_ended:
            return
        time.sleep(poll_s)


def trained_weights(run: RunDir, *, best: bool) -> Path:
    """The directory of the trained weights.

    Args:
        run: any run.
        best: of the best held-out value, not the last.

    Raises:
        LaunchError: there are none yet.
    """
    weights = run.weights(is_lora=run.read_plan().recipe.lora is not None, best=best)
    if not weights.is_dir():
        raise LaunchError(f"{weights}: does not exist yet; let the run finish first (trainer status {run.root})")
    return weights


def export_weights(
    run: RunDir,
    out: str | Path | None,
    *,
    merge: bool,
    best: bool,
    checkpoint: int | None = None,
    gguf: GgufKind | None = None,
) -> Path:
    """Run the exporter in a process of its own, which imports torch; returns the directory that it wrote.

    Args:
        run: with trained weights.
        out: output directory; inside the run directory when None.
        merge: merge the adapter into a copy of the base model.
        best: use the best weights, not the last.
        checkpoint: use the weights of the checkpoint of this step.
        gguf: write one GGUF file with weights of this type.

    Raises:
        TrainerError: nothing was exported; says why.
    """
    argv = [sys.executable, "-m", "trainer.export", str(run.root)]
    argv += ["--merge"] if merge else []
    argv += ["--best"] if best else []
    argv += ["--checkpoint", str(checkpoint)] if checkpoint is not None else []
    argv += ["--gguf", gguf] if gguf is not None else []
    argv += ["--out", str(out)] if out is not None else []
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        kind = UserError if done.returncode == EXIT_USER else TrainerError
        raise kind(done.stderr.strip() or f"{run.root}: the export ended with exit code {done.returncode}")
    return Path(done.stdout.strip().splitlines()[-1])
