"""Compiled layers on a CPU: the GPU's path is traced, and the compiler's back end runs its graphs as they are.

A test module imports `gpu_path`, a fixture that is used by all its tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model import attention, flex, lora_mlp
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy

CPU = torch.device("cpu")
PACKS = [(40, 7), (200, 90, 30), (12,), (140, 150, 61, 9)]


@pytest.fixture(autouse=True)
def gpu_path() -> Iterator[None]:
    """What the tests of a module run in."""
    with as_on_gpu():
        yield


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Compiled layers attend as on a GPU, which torch does on a CPU but for its check of devices.

    They use the operator of gated layers, which is for GPUs; its products are torch's on a CPU.
    """
    torch._dynamo.reset()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(lora_mlp, "has_kernels", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    on_cpu = attention._bucketed

    def with_mask(query: Any, key: Any, value: Any, layout: Any, options: Any) -> torch.Tensor:
        flex.block_mask_of(layout, options.window)  # the first pass on a GPU makes it
        return on_cpu(query, key, value, layout, options)

    monkeypatch.setattr(attention, "_bucketed", with_mask)
    try:
        yield
    finally:
        monkeypatch.undo()
        torch._dynamo.reset()


def graphs_of() -> tuple[list[Any], Any]:
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return graphs, keep


def make_policy(model_dir: Path, lora: LoraSettings | None, *, checkpointing: bool = False) -> Policy:
    policy = load_policy(
        ModelSettings(path=str(model_dir), compute_dtype="float32", gradient_checkpointing=checkpointing), lora, 0, CPU
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def rows_of(lengths: tuple[int, ...]) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        tokens = tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        inputs = TokenInputs(weights=(1.0,) * (length - 1))
        rows.append(TokenSequence(tokens, (False,) + (True,) * (length - 1), inputs))
    return rows


def make_pack(lengths: tuple[int, ...], device: torch.device = CPU) -> Batch:
    return Batch.pack(rows_of(lengths), device)


def gradients(policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.train()
    scores = policy(batch)
    parameters = policy.trained_parameters()
    found = torch.autograd.grad(scores.logprobs.sum(), list(parameters.values()))
    policy.eval()
    return scores.logprobs.detach(), dict(zip(parameters, found, strict=True))
