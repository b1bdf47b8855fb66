"""Decoder layers and head statistics of real sizes, lowered as a GPU compiles them; for scripts/lower.py.

Policy, compiled layers and masks are those of training, on fake tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final
from unittest import mock

import torch
from lowered_kernels import Launch, launches_of, thin_as_on_gpu
from lowering import Card, Program, flex_as_on_gpu, gpu_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig

from trainer.checks.memory_dry_run import materialize_fake
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model import attention
from trainer.model.base_model import empty_model
from trainer.model.batch import Batch
from trainer.model.flex import block_mask_of, prepare_compiler
from trainer.model.lm_head import GPU_TILE_ROWS, LogitTransform, fused_statistics
from trainer.model.policy import Policy, make_policy

CPU: Final = torch.device("cpu")
ADDMM: Final = re.compile(r"extern_kernels\.addmm\((\w+), .*out=(\w+)\)")


@final
@dataclass(frozen=True)
class Layer:
    """A model whose layers are lowered; its other sizes do not matter to one layer."""

    model_type: str
    sizes: dict[str, Any]


LAYERS: Final = {
    "Llama-3.1-8B": Layer(
        "llama",
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "intermediate_size": 14336, "vocab_size": 1024},
    ),
    "Qwen3-8B": Layer(
        "qwen3",
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "intermediate_size": 12288, "vocab_size": 1024},
    ),
    "Qwen2.5-1.5B": Layer(
        "qwen2",
        {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
         "vocab_size": 1024},
    ),
}  # fmt: skip
"""One layer each; a vocabulary of 1,024, because embedding and head are no part of it."""


def empty_policy(layer: Layer, lora: LoraSettings | None) -> Policy:
    """A policy with one layer and without weights."""
    config = AutoConfig.for_model(
        layer.model_type, num_hidden_layers=1, max_position_embeddings=32_768, pad_token_id=0, **layer.sizes
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            causal_lm = empty_model(config, torch.bfloat16).requires_grad_(False)
            return make_policy(causal_lm.eval(), ModelSettings(path="none"), lora, 0)
    finally:
        torch.set_default_dtype(before)


def pack_of(lengths: Sequence[int]) -> Batch:
    """A pack with a loss on three of four tokens."""
    rows = []
    for length in lengths:
        prompt = length // 4
        trained = (False,) * prompt + (True,) * (length - prompt)
        tokens = tuple(7 * index % 61 + 1 for index in range(length))
        rows.append(TokenSequence(tokens, trained, TokenInputs(weights=(1.0,) * (length - prompt))))
    return Batch.pack(rows, CPU)


@contextmanager
def first_pass_as_on_gpu(*, computed: bool = True) -> Iterator[None]:
    """Let attention on the CPU make the block mask of the pack, as the uncompiled pass on a GPU does.

    Args:
        computed: whether it computes its result too.
    """
    on_cpu = attention._bucketed

    def with_mask(query: Any, key: Any, value: Any, layout: Any, options: Any) -> Any:
        block_mask_of(layout, options.window)
        if computed:
            return on_cpu(query, key, value, layout, options)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])

    with mock.patch.object(attention, "_bucketed", with_mask):
        yield


def lowered_layer(
    layer: Layer, lora: LoraSettings | None, lengths: Sequence[int], card: Card
) -> tuple[list[Program], list[list[Launch]]]:
    """The programs of a layer, forward, backward and without gradient; and their launches at this size.

    Args:
        layer: of `LAYERS`.
        lora: the adapter; None trains every parameter.
        lengths: tokens of each document of the pack.
        card: to lower for.
    """
    torch._dynamo.reset()
    prepare_compiler()
    kept: list[Program] = []
    first = pack_of([512])

    batch, policy = pack_of(lengths), empty_policy(layer, lora)
    with (
        flex_as_on_gpu(),
        first_pass_as_on_gpu(computed=False),
        thin_as_on_gpu(),
        FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()),
    ):
        materialize_fake(policy)
        policy.compile_layers(gpu_backend(card, kept))
        policy.train()
        policy(first)
        policy(batch).logprobs.sum().backward()
        policy.eval()
        with torch.no_grad():
            policy(batch)
        if policy.compiled is None or policy.compiled.problem is not None:
            raise RuntimeError(f"the layer was not compiled: {policy.compiled and policy.compiled.problem}")
    return kept, [launches_of(program) for program in kept]


def lowered_statistics(vocab: int, card: Card, *, softcap: float | None, with_entropy: bool) -> Program:
    """The head's statistics of a tile, with their residual."""
    torch._dynamo.reset()
    prepare_compiler()
    kept: list[Program] = []
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        compiled = torch.compile(fused_statistics, dynamic=True, fullgraph=True, backend=gpu_backend(card, kept))
        logits = torch.empty(GPU_TILE_ROWS, vocab, dtype=torch.bfloat16)
        targets = torch.empty(GPU_TILE_ROWS, dtype=torch.long)
        compiled(logits, targets, LogitTransform(softcap=softcap), with_entropy, True, None)
    return kept[0]


def foreign_addmms(program: Program) -> list[tuple[str, str]]:
    """Input and output of each `addmm` that writes into another buffer than it adds to: a copy for each call.

    A bias has one dimension and is no copy.
    """
    return [pair for pair in ADDMM.findall(program.source) if pair[0] != pair[1] and pair[0].startswith("buf")]
