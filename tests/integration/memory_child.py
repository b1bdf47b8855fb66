"""Run a worker in this process and say how much memory it took: base after imports, peak at the end."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

IMPORTS = (
    "trainer.training.sft",
    "trainer.training.rft",
    "trainer.sampling.local",
    "trainer.worker",
    "torch.distributed.checkpoint.state_dict_saver",
    "torch.optim",
)


def resident_gib(name: str) -> float:
    """VmRSS or VmHWM of this process; `ru_maxrss` would begin with that of whoever started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def main() -> None:
    for name in (*IMPORTS, f"transformers.models.{sys.argv[2]}.modeling_{sys.argv[2]}"):
        importlib.import_module(name)
    base = resident_gib("VmRSS")
    code = importlib.import_module("trainer.worker").main([sys.argv[1]])
    print(json.dumps({"base": base, "peak": resident_gib("VmHWM"), "code": code}))


if __name__ == "__main__":
    main()
