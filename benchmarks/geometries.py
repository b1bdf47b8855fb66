"""Attention geometries of known models, and their lowering to machine code; for scripts/lower.py.

Heads, head size, window, soft cap and sinks as in the models' published config.json files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from lowering import Card, Program, flex_as_on_gpu, gpu_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from trainer.model.eager_attention import AttentionOptions
from trainer.model.flex import block_mask_of, flex_packed, prepare_compiler
from trainer.model.layout import PackedLayout

PACK: Final = (300, 212)
"""Tokens of the traced pack: whole blocks, as compiled layers get them. Kernels take any number of blocks."""
UNPADDED: Final = (300, 107)
"""As layers that are not compiled get them."""
SHORT: Final = (12, 12)
"""Shorter than a block: FlexAttention has another kernel for it."""


@final
@dataclass(frozen=True)
class Geometry:
    """One kind of attention layer."""

    models: str
    heads: int
    kv_heads: int
    width: int
    """Of queries and keys."""
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    value_width: int | None = None
    """None: as `width`."""
    lengths: tuple[int, ...] = PACK

    @property
    def name(self) -> str:
        """32/8x128 window 4096."""
        parts = [f"{self.heads}/{self.kv_heads}x{self.width}"]
        parts += [f"values {self.value_width}"] if self.value_width else []
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"cap {self.softcap:g}"] if self.softcap else []
        parts += ["sinks"] if self.has_sinks else []
        parts += [f"{sum(self.lengths)} tokens"] if self.lengths != PACK else []
        return " ".join(parts)


GEOMETRIES: Final = (
    Geometry("tests", 4, 2, 16),
    Geometry("tests, window", 4, 2, 16, window=50),
    Geometry("StarCoder 3B", 24, 2, 32),
    Geometry("SmolLM2 135M and 360M", 9, 3, 64),
    Geometry("SmolLM2 1.7B, OLMo 1B", 32, 32, 64),
    Geometry("Llama 3.2 1B, Granite 2B", 32, 8, 64),
    Geometry("Qwen2.5 0.5B", 14, 2, 64),
    Geometry("gpt-oss 20B and 120B", 64, 8, 64, window=128, has_sinks=True),
    Geometry("gpt-oss 20B and 120B", 64, 8, 64, has_sinks=True),
    Geometry("Phi 2", 32, 32, 80),
    Geometry("Phi 3 mini", 32, 32, 96, window=2047),
    Geometry("Llama 2 7B, OLMo 2 7B", 32, 32, 128),
    Geometry("Qwen3 0.6B and 1.7B", 16, 8, 128),
    Geometry("Llama 3.2 3B", 24, 8, 128),
    Geometry("Llama 3.1 8B, Qwen3 8B, SmolLM3 3B, Phi 4 14B", 32, 8, 128),
    Geometry("Mistral 7B 0.1", 32, 8, 128, window=4096),
    Geometry("Qwen2.5 14B and 32B", 40, 8, 128),
    Geometry("Qwen2.5 1.5B", 12, 2, 128),
    Geometry("Qwen2.5 7B", 28, 4, 128),
    Geometry("Llama 3.1 70B, Qwen3 32B and 30B-A3B, Qwen2.5 3B", 64, 8, 128),
    Geometry("Qwen3 235B-A22B, GLM 4 9B", 64, 4, 128),
    Geometry("Gemma 2 27B", 32, 16, 128, softcap=50.0),
    Geometry("Gemma 2 27B", 32, 16, 128, window=4096, softcap=50.0),
    Geometry("Gemma 3 27B", 32, 16, 128, window=1024),
    Geometry("DeepSeek V2 Lite", 16, 16, 192, value_width=128),
    Geometry("Gemma 2B", 8, 1, 256),
    Geometry("Gemma 7B", 16, 16, 256),
    Geometry("Gemma 2 2B and 9B", 8, 4, 256, softcap=50.0),
    Geometry("Gemma 2 2B and 9B", 8, 4, 256, window=4096, softcap=50.0),
    Geometry("Gemma 3 1B", 4, 1, 256, window=512),
    Geometry("Gemma 3 4B and 12B", 8, 4, 256, window=1024),
    Geometry("Llama 3.1 8B", 32, 8, 128, lengths=UNPADDED),
    Geometry("Gemma 2 2B", 8, 4, 256, window=4096, softcap=50.0, lengths=UNPADDED),
    Geometry("gpt-oss 20B and 120B", 64, 8, 64, window=128, has_sinks=True, lengths=UNPADDED),
    Geometry("Llama 3.1 8B", 32, 8, 128, lengths=SHORT),
    Geometry("SmolLM2 135M", 9, 3, 64, lengths=SHORT),
    Geometry("Gemma 2 2B", 8, 4, 256, softcap=50.0, lengths=SHORT),
)
"""One for each head size, ratio of query to key heads, and form; the number of heads only makes the grid larger."""


def programs_of(geometry: Geometry, card: Card, dtype: torch.dtype = torch.bfloat16) -> list[Program]:
    """The programs of one geometry: forward and backward, without gradient, and in inference mode."""
    prepare_compiler()
    torch._dynamo.reset()
    kept: list[Program] = []
    with flex_as_on_gpu(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        attend = torch.compile(flex_packed, fullgraph=True, dynamic=True, backend=gpu_backend(card, kept))
        for context in (nullcontext(), torch.no_grad(), torch.inference_mode()):
            with context:
                out = attend(*arguments_of(geometry, dtype, torch.empty))
            if out.requires_grad:
                out.sum().backward()
    return kept


def arguments_of(geometry: Geometry, dtype: torch.dtype, make: Any) -> Iterator[Any]:
    """The arguments of `flex_packed`.

    Args:
        geometry: heads, sizes and pack.
        dtype: of queries, keys and values.
        make: makes a tensor, as torch.empty and torch.randn.
    """
    total, layout = sum(geometry.lengths), PackedLayout.of_lengths(geometry.lengths, torch.device("cpu"))
    for heads, width in (
        (geometry.heads, geometry.width),
        (geometry.kv_heads, geometry.width),
        (geometry.kv_heads, geometry.value_width or geometry.width),
    ):
        yield make(1, heads, total, width, dtype=dtype, requires_grad=torch.is_grad_enabled())
    yield block_mask_of(layout, geometry.window)
    sinks = make(geometry.heads, dtype=dtype) if geometry.has_sinks else None
    yield AttentionOptions(geometry.width**-0.5, geometry.window, geometry.softcap, sinks)
