"""Writes a run directory as training would leave it, for tests of the mirror."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from trainer.run.directory import RunDir

IDENTITY: Final = "a" * 64


def saved_run(root: Path, steps: int, *, identity: str = IDENTITY, name: str = "small") -> RunDir:
    """A run of `steps` steps with a checkpoint after every second one, and best weights of step 1."""
    run = RunDir(root / name)
    for step in range(2, steps + 1, 2):
        save_step(run, step, identity=identity)
    write_metrics(run, steps)
    best = run.weights(is_lora=True, best=True)
    (best / "templates").mkdir(parents=True)
    (best / "adapter_model.safetensors").write_bytes(b"best of step 1")
    (best / "templates" / "tool.jinja").write_text("{{ tools }}")
    run.tracker_file.write_text('{"id": "abc", "step": 3}')
    return run


def save_step(run: RunDir, step: int, *, identity: str = IDENTITY) -> None:
    """Write one checkpoint in the format of trainer/checkpoints/local.py."""
    directory = run.checkpoint(step)
    directory.mkdir(parents=True)
    contents = {"__0_0.distcp": f"tensors of {step}".encode() * 100, ".metadata": f"metadata of {step}".encode()}
    files = {}
    for file, content in contents.items():
        (directory / file).write_bytes(content)
        files[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {
        "format": 1,
        "step": step,
        "counters": {"updates": step},
        "world_size": 1,
        "identity_hash": identity,
        "files": files,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))


def write_metrics(run: RunDir, steps: int, *, loss: float = 0.1) -> None:
    """Write metrics.jsonl up to a step."""
    records = [{"step": step, "time": 1.5, "train/loss": loss * step} for step in range(steps + 1)]
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))


def files_under(directory: Path) -> dict[str, bytes]:
    """Contents of every file by relative path, hidden files included."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
