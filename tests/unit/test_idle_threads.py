"""How long idle OpenMP threads spin: chosen by quota and load, and set before torch is loaded."""

import os
import subprocess
import sys

import pytest

from trainer.distributed.idle_threads import OWN, SHARED, IdleThreads, choose_idle_threads, cpu_quota


@pytest.mark.parametrize(
    ("asked", "environment", "quota", "load", "spin"),
    [
        (None, {}, None, 0.1, OWN),
        (None, {}, None, 3.0, SHARED),
        (None, {}, 1.5, 0.1, SHARED),
        (None, {}, 2.0, 0.1, OWN),
        (None, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, None, 0.1, OWN),
        (None, {"LOCAL_WORLD_SIZE": "2"}, None, 0.1, 0),  # two ranks with two threads each on two cores
        (None, {"OMP_NUM_THREADS": "8,2"}, None, 0.1, 0),
        (None, {"OMP_WAIT_POLICY": "ACTIVE"}, None, 0.1, None),
        (200_000, {"OMP_WAIT_POLICY": "PASSIVE"}, 1.0, 3.0, 200_000),
    ],
)
def test_the_spin_count_follows_quota_load_and_threads(asked, environment, quota, load, spin):
    assert choose_idle_threads(asked, environment, cores=2, quota=quota, load=load).spin == spin


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None)])
def test_the_quota_of_the_control_group_is_read(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cores
    assert cpu_quota(tmp_path / "missing") is None


def test_the_variable_reaches_the_openmp_library_of_torch():
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP", "KMP"))
    }
    IdleThreads(1234, "a test").apply(environment)
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GOMP_SPINCOUNT = '1234'" in done.stderr
