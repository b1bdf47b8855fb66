"""The engine's memory does not grow with the number of requests, whose steps all have other numbers of tokens."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model_dir

from trainer.engine.__main__ import CACHED_SHAPES, SHAPE_CACHES, main

SCRIPT = """
import ctypes, sys
from trainer.config.recipe import ModelSettings
from trainer.engine.model import EngineModel, StepRow
from trainer.engine.attention import Segment
from trainer.engine.pages import PAGE

class Info(ctypes.Structure):  # mallinfo2 of glibc 2.33 and later
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free f".split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Info
model = EngineModel(ModelSettings(path=sys.argv[1]), 4)
pool = model.pool(8)
before = None
for count in range(2, 162):
    model.step(pool, [StepRow(list(range(count)), Segment(list(range(8)), 0, count), None, [count - 1])])
    if count == 30:
        before = library.mallinfo2().used
print(library.mallinfo2().used - before)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads glibc's statistics")
def test_prepared_kernels_of_old_shapes_are_dropped(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "model")

    def grown(capacity: int) -> int:
        limits = dict.fromkeys(SHAPE_CACHES, str(capacity))
        words = [sys.executable, "-c", SCRIPT, str(directory)]
        environment = {**os.environ, **limits, "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)

    assert grown(16) < grown(1024) / 2


def test_the_engine_bounds_the_caches_and_leaves_what_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SHAPE_CACHES[0], "7")
    monkeypatch.delenv(SHAPE_CACHES[1], raising=False)
    assert main(["--model", '{"path": "nowhere"}', "--socket", str(tmp_path / "socket")]) != 0
    assert [os.environ[name] for name in SHAPE_CACHES] == ["7", str(CACHED_SHAPES)]
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.delenv(SHAPE_CACHES[1])
