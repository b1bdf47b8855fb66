"""Predict the time of a training step on one GPU: bytes and FLOPs over the rates of the device. Torch-free.

A part is a range: products of matrices reach 61 to 71% of the peak (H100: 600 to 700 TFLOP/s). Each rate says where it
was measured; other GPUs are assumed to reach the same fractions of their data sheet.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from trainer.config.devices import KnownDevice
from trainer.planning.activations import Recomputed
from trainer.planning.model_facts import ModelFacts
from trainer.planning.module_names import GATED, JOINED
from trainer.planning.thin_cut import GATED_ROWS, MAX_RANK, ROWS, Cut

PRODUCT_FRAC: Final = (0.61, 0.71)
"""Of the peak; measured at 0.70 for Qwen3-8B with 4,096 tokens on an H100 (docs/performance.md)."""
FLASH_FRAC: Final = ((1024, 0.214), (2048, 0.365), (4096, 0.496), (8192, 0.580))
"""Of the peak, by FLOPs that the mask leaves, for documents of this many tokens: FlashAttention-3 on an H100, forward
and backward, 192 heads of 128 (meta-pytorch/tritonbench, pull request 1267). FlashAttention-4 has the same speed there
(pytorch/torchtitan, pull request 4413)."""
FLASH_SLOW: Final = 2 / 3
"""Of that: sequences of unequal length, other heads."""
ATTENTION_FRAC: Final = 0.30
"""The same of FlexAttention, where all blocks are whole."""
SHORT_ATTENTION: Final = (0.054, 512)
"""The fraction that was measured there, for documents of this many tokens on average, whose blocks are mostly partial;
it is assumed to grow with their length, up to two thirds of `ATTENTION_FRAC`."""
BANDWIDTH_FRAC: Final = 0.84
"""Of the data sheet: 2.8 TB/s of an H100."""
THIN_FRAC: Final = 0.6
"""Of that: products of rank 16."""
UNCOMPILED: Final = 9.6
"""Elementwise traffic of an uncompiled layer, forward and backward, over that of a compiled one forward: it has 52 + 94
kernels."""
LAUNCH_S: Final = (10e-6, 28e-6)
"""Host time of a kernel launch, Python included; 28 us were measured where the host was the limit."""
LAUNCHES: Final = {"compiled LoRA": 46, "compiled LoRA without kernels": 70, "compiled full": 38, "uncompiled": 250}
"""Per layer, forward and backward; counted (benchmarks/results/lowering_sm_90.md): 46 are 13 of the compiler's
kernels and 33 of adapted products."""
BETWEEN_S: Final = (0.01, 0.04)
"""Between two optimizer steps the device waits for the next pack and for the norm of the gradient."""
BYTES: Final = 2


@final
@dataclass(frozen=True)
class StepCost:
    """Predicted cost of one micro-batch, forward and backward; pairs are (fast, slow)."""

    parts_s: dict[str, tuple[float, float]]
    """Seconds of the device by part."""
    host_s: tuple[float, float]
    """Seconds that the host needs to launch the kernels, at the same time."""
    tokens: int
    flops_4n: float
    """4 N FLOPs per token, N without embeddings, and the head on scored tokens."""
    flops: float
    """The same and attention."""
    peak: float
    """FLOP/s of the data sheet."""
    micro_batches: int = 1
    """Of an optimizer step, on each device."""

    @property
    def step_s(self) -> tuple[float, float]:
        """Seconds of a micro-batch, with its share of the time between two optimizer steps."""
        fast, slow = (max(sum(part[side] for part in self.parts_s.values()), self.host_s[side]) for side in (0, 1))
        return fast + BETWEEN_S[0] / self.micro_batches, slow + BETWEEN_S[1] / self.micro_batches

    @property
    def mfu(self) -> tuple[float, float]:
        """Fraction of the peak by `flops_4n`, (slow, fast)."""
        fast, slow = self.step_s
        return self.flops_4n / slow / self.peak, self.flops_4n / fast / self.peak

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """(slow, fast)."""
        fast, slow = self.step_s
        return self.tokens / slow, self.tokens / fast


def step_cost(
    facts: ModelFacts,
    device: KnownDevice,
    lengths: Sequence[int],
    num_scored: int,
    *,
    rank: int | None,
    is_compiled: bool,
    recomputed: Recomputed = False,
    uses_flash: bool = False,
) -> StepCost:
    """Predict a micro-batch.

    Args:
        facts: of the model.
        device: of the shape.
        lengths: tokens of each document of the pack.
        num_scored: tokens with a loss.
        rank: of the adapter that is trained; None: every parameter is.
        is_compiled: whether decoder layers are compiled.
        recomputed: whether layers are computed a second time in the backward pass; selectively: without products and
            attention.
        uses_flash: whether FlashAttention-4 computes attention, in compiled layers.
    """
    tokens, peak, bandwidth = sum(lengths), device.bf16_tflops * 1e12, device.bandwidth_gbps * 1e9 * BANDWIDTH_FRAC
    passes = 3 if rank is None else 2
    block = 2.0 * facts.active_block_params * tokens
    head = 2.0 * facts.vocab * facts.hidden * num_scored
    attention = 2.0 * facts.layers * facts.query_width * sum(length * length for length in lengths)
    again = 1 if recomputed is True else 0
    elementwise = facts.layers * elementwise_bytes(facts, tokens, is_compiled=is_compiled)
    thin = facts.layers * adapter_bytes(facts, tokens, rank, is_compiled=is_compiled)
    extra = 1 + again / 3
    elementwise_extra = 4 / 3 if recomputed else 1.0
    parts = {
        "products": _range((passes + again) * block, PRODUCT_FRAC, peak),
        "head": _range(passes * head, PRODUCT_FRAC, peak),
        "attention": _range((3.5 + again) * attention, _attention_frac(tokens / len(lengths), uses_flash), peak),
        "elementwise": (elementwise * elementwise_extra / bandwidth,) * 2,
        "adapters": (thin * extra / bandwidth / THIN_FRAC,) * 2,
        "head statistics": (3 * num_scored * facts.vocab * BYTES / bandwidth,) * 2,
    }
    if rank is None:
        # fp32 master, gradient and two moments are read and written, the gradient three times more; the model's copy
        parts["optimizer"] = (46.0 * (facts.active_block_params + facts.vocab * facts.hidden) / bandwidth,) * 2
    launches = facts.layers * LAUNCHES[_kind(rank, is_compiled=is_compiled)] * extra
    return StepCost(
        parts_s=parts,
        host_s=(launches * LAUNCH_S[0], launches * LAUNCH_S[1]),
        tokens=tokens,
        flops_4n=passes * (block + head),
        flops=passes * (block + head) + 3 * attention,
        peak=peak,
    )


def _attention_frac(length: float, uses_flash: bool) -> tuple[float, float]:
    """(slow, fast) fractions of the peak, for documents of a length; proportional to it below the table's first one."""
    lengths, fractions = zip(*FLASH_FRAC, strict=True)
    place = bisect_left(lengths, length)
    if place == 0:
        flash = fractions[0] * length / lengths[0]
    elif place == len(lengths):
        flash = fractions[-1]
    else:
        part = math.log2(length / lengths[place - 1]) / math.log2(lengths[place] / lengths[place - 1])
        flash = fractions[place - 1] + part * (fractions[place] - fractions[place - 1])
    if uses_flash:
        return FLASH_SLOW * flash, flash
    short = SHORT_ATTENTION[0] * length / SHORT_ATTENTION[1]
    return min(short, ATTENTION_FRAC / 1.5), min(flash, ATTENTION_FRAC)


def _range(flops: float, fractions: tuple[float, float], peak: float) -> tuple[float, float]:
    slow, fast = fractions
    return flops / (fast * peak), flops / (slow * peak)


def _kind(rank: int | None, *, is_compiled: bool) -> str:
    if not is_compiled:
        return "uncompiled"
    if rank is None:
        return "compiled full"
    return "compiled LoRA" if rank <= MAX_RANK else "compiled LoRA without kernels"


def elementwise_bytes(facts: ModelFacts, tokens: int, *, is_compiled: bool) -> float:
    """Bytes of a block's norms, rotary embedding, gate and residuals, as counted in the kernels of compiled layers.

    Forward: two norms (4 H), two residual sums (5 H), rotary (2 (q + k)), gate (3 I). Backward: norms with residuals
    (8 H), the sums of attention (2 q), rotary (2 (q + 2 k)), gate (5 I).

    Args:
        facts: of the model.
        tokens: T.
        is_compiled: whether decoder layers are compiled.
    """
    width = facts.intermediate * facts.active_experts + facts.shared_intermediate
    rotated = facts.query_width + facts.key_width
    forward = 9 * facts.hidden + 2 * rotated + 3 * width
    if not is_compiled:
        return UNCOMPILED * (forward + (2 * rotated if facts.has_inner_norms else 0)) * tokens * BYTES
    backward = 8 * facts.hidden + 4 * rotated + 5 * width + (3 * rotated if facts.has_inner_norms else 0)
    return float((forward + backward) * tokens * BYTES)


def adapter_bytes(facts: ModelFacts, tokens: int, rank: int | None, *, is_compiled: bool) -> float:
    """Bytes of a block's adapter products, forward and backward.

    Each reads its input or writes its output, four times each in all. Forward: A reads x; B reads and writes y.
    Backward: B^T reads the gradient; A^T reads and writes the gradient of x; the gradients of A and B read x and the
    gradient once more. In compiled layers, joined layers share x and its gradient, and the kernels of
    trainer/model/thin.py read a gradient once and write partial sums. In a gated layer, what is as wide as the gate is
    neither read nor written for the adapters' sake.

    Args:
        facts: of the model.
        tokens: T.
        rank: of the adapters; None: there are none.
        is_compiled: whether decoder layers are compiled.
    """
    if rank is None:
        return 0.0
    linears = {name: (width_in, width_out) for name, width_in, width_out in facts.adapted_linears()}
    if not is_compiled:
        return 4.0 * sum(map(sum, linears.values())) * tokens * BYTES
    has_kernels = rank <= MAX_RANK
    is_gated = has_kernels and facts.is_swiglu and all(name in linears for name in GATED)
    total = 0.0
    for names in _joined(linears):
        widths = [linears[name][1] for name in names]
        if is_gated and names == GATED[:2]:
            cut = Cut.of(tokens, widths[:1], GATED_ROWS)
            sums = cut.partial_bytes(rank, of_strips=0) + cut.partial_bytes(rank, of_parts=2, of_strips=3)
            total += 4.0 * linears[names[0]][0] * tokens * BYTES + sums
            continue
        inputs = 0 if is_gated and names == GATED[2:] else 4 * linears[names[0]][0]
        sums = Cut.of(tokens, widths, ROWS).partial_bytes(rank) if has_kernels else 0.0
        total += (inputs + (3.0 if has_kernels else 4.0) * sum(widths)) * tokens * BYTES + sums
    return total


def _joined(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The layers whose products are joined, and each other one."""
    rest, found = list(names), []
    for group in JOINED:
        if all(name in rest for name in group):
            found.append(group)
            rest = [name for name in rest if name not in group]
    return found + [(name,) for name in rest]
