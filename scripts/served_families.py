"""Serve a tiny model of every family that transformers knows, and compare its tokens with its own forward pass.

Each family runs in a forked child with a time limit. Prints one JSON line for each: `paged`, or `refused` with the
reason, or `note` with `gap`, the largest distance of a greedy token's logit from the highest one by a pass without a
cache (0: equal tokens), or `unbuilt`, or `died` with the last line. Ends with 1 where a family died or has a gap.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import matrix_configs
import matrix_measure
import torch
from matrix_child import start, write_record

from trainer.config.recipe import ModelSettings
from trainer.engine.own_model import OwnModel, open_model
from trainer.engine.protocol import Sampling
from trainer.engine.scheduler import Scheduler
from trainer.engine.sequences import LiveSequence
from trainer.errors import TrainerError

LIMIT_S: Final = 300
NUM_PROMPT, NUM_DRAWN = 40, 6


def serve(name: str, directory: Path) -> dict[str, Any]:
    """What became of a family."""
    family, changes = matrix_configs.VARIANTS.get(name, (name, {}))
    try:
        matrix_measure.build(directory, family, changes)
    except Exception as error:  # a model's code may fail in any way
        return {"unbuilt": f"{type(error).__name__}: {error}"[:200]}
    try:
        model = open_model(ModelSettings(path=str(directory / "model"), compute_dtype="float32"), 16)
    except TrainerError as error:
        return {"refused": str(error).replace(str(directory), "")[:300]}
    if not isinstance(model, OwnModel):
        return {"paged": True}
    prompt = tuple((3 + 7 * index) % (model.vocab_size - 1) for index in range(NUM_PROMPT))
    sequence = LiveSequence(name, prompt, Sampling(max_tokens=NUM_DRAWN, seed=1, temperature=0.0), None)
    scheduler = Scheduler(model, model.pool(64))
    scheduler.add(sequence)
    while not scheduler.is_idle:
        scheduler.step()
    rows = model.logprobs([*prompt, *sequence.drawn])[NUM_PROMPT - 1 : -1]
    gaps = [float(row.max() - row[token]) for row, token in zip(rows, sequence.drawn, strict=True)]
    return {"note": model.note, "gap": max(gaps)}


def in_child(name: str) -> dict[str, Any]:
    """Run a family in a child, so that a crash or a hang ends only its own line."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)

        def work() -> None:
            signal.alarm(LIMIT_S)
            write_record(directory, serve(name, directory))

        _, status = os.waitpid(start(directory, work), 0)
        file = directory / "record.json"
        lines = (directory / "log.txt").read_text().strip().splitlines()
        died = {"died": os.waitstatus_to_exitcode(status), "last": lines[-1][:300] if lines else ""}
        return {"family": name, **(json.loads(file.read_text()) if file.is_file() else died)}


def main() -> int:
    """Serve the families asked for, or all."""
    torch.set_num_threads(1)
    is_right = True
    for name in sys.argv[1:] or sorted([*matrix_configs.families(), *matrix_configs.VARIANTS]):
        found = in_child(name)
        is_right &= "died" not in found and found.get("gap", 0) == 0
        print(json.dumps(found), flush=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
