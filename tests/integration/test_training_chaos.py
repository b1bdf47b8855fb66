"""A few kills of `scripts/training_chaos`: client, executor, server; the losses are those of an undisturbed run."""

from __future__ import annotations

import pytest
from chaos_training import TINKER, Chaos
from tiny import tiny_model_dir

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not TINKER.is_file(), reason="no tinker client: set TUNESMITH_TINKER_PYTHON"),
]


def test_a_training_whose_parts_are_killed_equals_one_that_was_left_alone(tmp_path) -> None:
    model = tiny_model_dir(tmp_path / "model", "llama", scale=5.0)
    report = Chaos(model, tmp_path, steps=10, seed=0).run(3, patience_s=300)
    assert dict(report.kills) == {"client": 1, "executor": 1, "server": 1}
    assert report.unequal == []
    assert report.num_lines >= report.steps
