"""A rank ends with its own exit code, whatever its threads do meanwhile."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

BEGIN: Final = """
import atexit, sys, threading
from trainer.distributed.leaving import exit_with

class Noisy:
    def __del__(self):
        print("finalized", flush=True)

def main():
    atexit.register(print, "handler")
    sys.modules["noisy"] = Noisy()
"""
BACKWARD: Final = """
    import torch

    def work():
        kept = [torch.ones(64, requires_grad=True) for _ in range(50)]
        while True:
            for tensor in kept:
                (tensor * 2).sum().backward()

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    import time
    time.sleep(0.2)
"""


def ended(body: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + body + "\nexit_with(main)"], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("    return 0", 0),
        ("    return 4", 4),
        ("    sys.exit(2)", 2),
        ("    sys.exit()", 0),
        ("    sys.exit('no')", 1),
    ],
)
def test_its_code_after_the_exit_handlers_and_before_finalization(end, code):
    found, said, _ = ended(end)
    assert (found, said) == (code, "handler\n")


def test_an_exception_is_printed_and_ends_with_1():
    code, _, said = ended("    raise ValueError('bad')")
    assert code == 1
    assert "ValueError: bad" in said


def test_threads_inside_torch_do_not_abort_it():
    """Finalization under these threads ended with SIGABRT in part of the attempts."""
    for _ in range(3):
        assert ended(BACKWARD + "    return 0")[0] == 0
