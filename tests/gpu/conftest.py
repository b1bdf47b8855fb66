"""Tests that need a GPU: skipped with a word where torch sees none. Run: `pytest tests/gpu`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from project import Project
from tiny import tiny_model_dir

HERE: Final = Path(__file__).parent
ONE_GPU: Final[dict[str, Any]] = {
    "name": "gpu", "device": "cuda", "device_name": "one", "gpus": 1, "gpu_memory_gib": 70, "micro_batch_tokens": 256,
    "accelerate": "single",
    "limits": {"lora": {"max_params_b": 10, "max_seq_tokens": 4096, "basis": "estimated"}},
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        # advice of the compiler; that attention was NOT compiled stays an error
        item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor.*"))
        item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo.*"))
        item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"))


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """The device, its memory counters at zero. What was compiled stays, as in a long run."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads of 16, the smallest that FlexAttention's kernel takes."""
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen3", scale=4.0, head_dim=16)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project directory for real workers on one GPU."""
    root = tmp_path_factory.mktemp("project").resolve()
    tiny_model_dir(root / "model", "llama", head_dim=16)
    for name, first in (("train", 0), ("eval", 100)):
        rows = [_row(number) for number in range(first, first + 24)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "gpu.yaml").write_text(json.dumps(ONE_GPU))
    project = Project(root)
    yield project
    project.kill_all()


def _row(number: int) -> dict[str, object]:
    """A sum; rows differ in length."""
    question = f"what is the sum of {number} and {3 * number}?" + " please" * (number % 5)
    answer = f"the answer is {4 * number}." + " and 12 cats" * (number % 3)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
