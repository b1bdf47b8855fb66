"""The worker with deterministic kernels only: torch raises where an operation has none."""

from __future__ import annotations

import os
import sys

import torch

from trainer.worker import main

if __name__ == "__main__":
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "cuBLAS reads it when it starts"
    torch.use_deterministic_algorithms(True)
    sys.exit(main(sys.argv[1:]))
