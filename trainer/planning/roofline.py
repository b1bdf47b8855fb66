"""Predict the time of a training step on one GPU: bytes and FLOPs over the rates of the device. Torch-free.

A part is a range: products of matrices reach 61 to 71% of the peak (H100: 600 to 700 TFLOP/s). Each rate says where it
was measured; other GPUs are assumed to reach the same fractions of their data sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from trainer.config.devices import KnownDevice
from trainer.planning.activations import Recomputed
from trainer.planning.model_facts import ModelFacts
from trainer.planning.module_names import JOINED

PRODUCT_FRAC: Final = (0.61, 0.71)
"""Of the peak; measured at 0.70 for Qwen3-8B with 4,096 tokens on an H100 (docs/performance.md)."""
ATTENTION_FRAC: Final = 0.30
"""Of the peak, by FLOPs that the mask leaves, where all blocks are whole."""
SHORT_ATTENTION: Final = (0.054, 512)
"""The fraction that was measured there, for documents of this many tokens on average, whose blocks are mostly partial;
it is assumed to grow with their length, up to two thirds of `ATTENTION_FRAC`."""
BANDWIDTH_FRAC: Final = 0.84
"""Of the data sheet: 2.8 TB/s of an H100."""
THIN_FRAC: Final = 0.6
"""Of that: products of rank 16."""
ELEMENTWISE_PASSES: Final = 2.3
"""Forward and backward elementwise traffic of a compiled layer over that of its forward pass alone: 0.74 and 0.96 GB
were counted in the kernels of a layer of Llama-3.1-8B (benchmarks/results/lowering_sm_90.md)."""
UNCOMPILED: Final = 4.17
"""Times the elementwise traffic of compiled layers: 52 + 94 kernels a layer instead of 9 + 6."""
LAUNCH_S: Final = (10e-6, 28e-6)
"""Host time of a kernel launch, Python included; 28 us were measured where the host was the limit."""
LAUNCHES: Final = {True: 72, False: 250}
"""Per layer, forward and backward, compiled or not; counted: 72 are 15 Triton kernels and 57 of the adapters' products
(benchmarks/results/lowering_sm_90.md)."""
BETWEEN_S: Final = (0.01, 0.04)
"""Between two steps the device waits for the next pack and for the norm of the gradient."""
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

    @property
    def step_s(self) -> tuple[float, float]:
        """Seconds from step to step."""
        fast, slow = (max(sum(part[side] for part in self.parts_s.values()), self.host_s[side]) for side in (0, 1))
        return fast + BETWEEN_S[0], slow + BETWEEN_S[1]

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
    is_lora: bool,
    is_compiled: bool,
    recomputed: Recomputed = False,
) -> StepCost:
    """Predict a micro-batch.

    Args:
        facts: of the model.
        device: of the shape.
        lengths: tokens of each document of the pack.
        num_scored: tokens with a loss.
        is_lora: whether an adapter is trained; otherwise every parameter.
        is_compiled: whether decoder layers are compiled.
        recomputed: whether layers are computed a second time in the backward pass; selectively: without products and
            attention.
    """
    tokens, peak, bandwidth = sum(lengths), device.bf16_tflops * 1e12, device.bandwidth_gbps * 1e9 * BANDWIDTH_FRAC
    passes = 2 if is_lora else 3
    block = 2.0 * facts.active_block_params * tokens
    head = 2.0 * facts.vocab * facts.hidden * num_scored
    attention = 2.0 * facts.layers * facts.query_width * sum(length * length for length in lengths)
    again = 1 if recomputed is True else 0
    short = SHORT_ATTENTION[0] * tokens / len(lengths) / SHORT_ATTENTION[1]
    elementwise = facts.layers * _elementwise_bytes(facts, tokens) * (1.0 if is_compiled else UNCOMPILED)
    thin = facts.layers * _thin_bytes(facts, tokens, is_joined=is_compiled) if is_lora else 0.0
    extra = 1 + again / 3
    elementwise_extra = 4 / 3 if recomputed else 1.0
    parts = {
        "products": _range((passes + again) * block, PRODUCT_FRAC, peak),
        "head": _range(passes * head, PRODUCT_FRAC, peak),
        "attention": _range((3.5 + again) * attention, (min(short, ATTENTION_FRAC / 1.5), ATTENTION_FRAC), peak),
        "elementwise": (elementwise * elementwise_extra / bandwidth,) * 2,
        "adapters": (thin * extra / bandwidth / THIN_FRAC,) * 2,
        "head statistics": (3 * num_scored * facts.vocab * BYTES / bandwidth,) * 2,
    }
    if not is_lora:
        # fp32 master, gradient and two moments are read and written, the gradient three times more; the model's copy
        parts["optimizer"] = (46.0 * (facts.active_block_params + facts.vocab * facts.hidden) / bandwidth,) * 2
    launches = facts.layers * LAUNCHES[is_compiled] * extra
    return StepCost(
        parts_s=parts,
        host_s=(launches * LAUNCH_S[0], launches * LAUNCH_S[1]),
        tokens=tokens,
        flops_4n=passes * (block + head),
        flops=passes * (block + head) + 3 * attention,
        peak=peak,
    )


def _range(flops: float, fractions: tuple[float, float], peak: float) -> tuple[float, float]:
    slow, fast = fractions
    return flops / (fast * peak), flops / (slow * peak)


def _elementwise_bytes(facts: ModelFacts, tokens: int) -> float:
    """Bytes of a block's norms, rotary embedding, gate and residuals, compiled.

    Forward: two norms (4 H), two residual sums (5 H), rotary (2 (q + k)), gate (3 I).
    """
    width = facts.intermediate * facts.active_experts + facts.shared_intermediate
    inner_norms = 2 * (facts.query_width + facts.key_width) if facts.has_inner_norms else 0
    forward = 9 * facts.hidden + 2 * (facts.query_width + facts.key_width) + inner_norms + 3 * width
    return ELEMENTWISE_PASSES * forward * tokens * BYTES


def _thin_bytes(facts: ModelFacts, tokens: int, *, is_joined: bool) -> float:
    """Bytes of a block's adapter products: each reads its input or writes its output, four times each in all.

    Forward: A reads x; B reads and writes y. Backward: B^T reads the gradient; A^T reads and writes the gradient of x;
    the gradients of A and B read x and the gradient once more. Joined layers share x and its gradient.
    """
    shared: set[tuple[str, ...]] = set()
    width = 0
    for name, width_in, width_out in facts.adapted_linears():
        group = next((each for each in JOINED if name in each), None)
        width += width_out if is_joined and group in shared else width_in + width_out
        if group is not None:
            shared.add(group)
    return 4.0 * width * tokens * BYTES
