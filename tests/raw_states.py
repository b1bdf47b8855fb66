"""A saved state of a few steps of training in process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.api.datum import Datum
from trainer.api.service import open_service


def trained_state(model_dir: Path, target: Path) -> None:
    """Train a tiny model for three steps, and save the state.

    Args:
        model_dir: of the base.
        target: directory of the state.
    """
    model = open_service(model_dir, compute_dtype="float32").create(rank=4, seed=1)
    random = np.random.default_rng(0)
    data = [Datum.shifted(random.integers(3, 320, size=length).tolist()) for length in (9, 17, 5)]
    for _ in range(3):
        model.forward_backward(data, "cross_entropy")
        model.optim_step(learning_rate=1e-2)
    target.parent.mkdir(parents=True)
    model.save_state(target)
