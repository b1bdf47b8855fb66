#!/usr/bin/env python
"""Write the tables of docs/scaling.md: memory, bytes and seconds of a training step by formula; nothing is measured.

python scripts/scaling_table.py            write them
python scripts/scaling_table.py --check    exit 1 if the page has other numbers
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import yaml

from trainer.config.recipe import LoraSettings
from trainer.planning.memory import FRAGMENTATION_FRAC, GIB, PROCESS_GIB
from trainer.planning.model_facts import ModelFacts

HEAD_TILE_ROWS: Final = 256
"""Trained positions that the LM head handles at a time."""
ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "scaling.md"
CARDS: Final = {"8B": "meta-llama/Llama-3.1-8B-Instruct", "70B": "meta-llama/Meta-Llama-3-70B-Instruct"}
LORA: Final = LoraSettings(rank=16)
GPUS: Final = (1, 8, 64, 256, 1024)
CONTEXTS: Final = (8_192, 65_536, 262_144, 1_048_576)

FLOPS: Final = 989e12
"""Dense bf16 FLOP/s of an H100 SXM."""
NVLINK: Final = 450e9
"""Bytes per second and direction of one GPU inside its node."""
ADAPTER: Final = 50e9
"""Bytes per second and direction of one network adapter of 400 Gb/s; each GPU of a node has one."""
NODE: Final = 8
"""GPUs of a node."""
GPU_GIB: Final = 79.0
"""Memory of an H100 80 GB, as configs/shapes/h100x8.yaml has it."""
COMPUTE_BYTES: Final = 2
"""Bytes of a weight, an activation and a gathered parameter in bf16."""


def model(name: str) -> ModelFacts:
    """The sizes of `8B` or `70B`."""
    known = yaml.safe_load((ROOT / "configs" / "models" / "known.yaml").read_text(encoding="utf-8"))
    facts = ModelFacts.from_config(known[CARDS[name]])
    assert facts is not None
    return facts


def bandwidth(gpus: int) -> float:
    """Bytes per second that one GPU receives in a collective over `gpus` GPUs.

    One ring per adapter: a node forwards what it receives by one of its 8 adapters to the other 7 GPUs over NVLink, so
    every GPU receives at the rate of all 8 adapters together.

    >>> bandwidth(8) / 1e9, bandwidth(16) / 1e9
    (450.0, 400.0)
    """
    return NVLINK if gpus <= NODE else min(NVLINK, NODE * ADAPTER)


def share(gpus: int) -> float:
    """The fraction of a sharded tensor that a GPU does not hold itself.

    >>> share(1), share(8)
    (0.0, 0.875)
    """
    return (gpus - 1) / gpus


def adapter_bytes(facts: ModelFacts, gpus: int) -> float:
    """Received per GPU and step: one all-reduce of the adapters' float32 gradients, which goes around a ring twice."""
    return 2 * share(gpus) * 4 * facts.lora_params(LORA)


def gather_bytes(facts: ModelFacts, gpus: int) -> float:
    """Received per GPU and micro-batch of full parameters: each once in forward and once in backward."""
    return 2 * share(gpus) * COMPUTE_BYTES * facts.params


def block_bytes(facts: ModelFacts, gpus: int) -> float:
    """The same of a frozen base: embedding and head are whole on each GPU."""
    return 2 * share(gpus) * COMPUTE_BYTES * facts.block_params


def scatter_bytes(facts: ModelFacts, gpus: int) -> float:
    """Received per GPU and micro-batch in full-parameter training: float32 gradients, reduced to the shards."""
    return share(gpus) * 4 * facts.params


def full_bytes(facts: ModelFacts, gpus: int) -> float:
    """Received per GPU and micro-batch in full-parameter training, both ways."""
    return gather_bytes(facts, gpus) + scatter_bytes(facts, gpus)


def context_bytes(facts: ModelFacts, context: int, parts: int) -> float:
    """Received per GPU and sequence that `parts` GPUs share: keys and values forward and backward, and their gradients.

    >>> context_bytes(model("8B"), 1000, 1)
    0.0
    """
    once = 2 * facts.layers * facts.key_width * context * COMPUTE_BYTES
    return 3 * share(parts) * once


def forward_flops_per_token(facts: ModelFacts, context: int) -> float:
    """FLOPs of one token of a full context: linear layers, head, and attention to half the context on average."""
    linear = 2.0 * (facts.active_block_params + facts.vocab * facts.hidden)
    return linear + 2.0 * facts.layers * facts.query_width * context


def flops_per_token(facts: ModelFacts, context: int, *, is_lora: bool) -> float:
    """FLOPs of forward, backward, and the recomputed forward of the blocks.

    LoRA computes no gradients of base weights: its backward costs one linear forward, full-parameter training two.
    """
    linear = forward_flops_per_token(facts, 0)
    attention = forward_flops_per_token(facts, context) - linear
    recomputed = 2.0 * facts.active_block_params + attention
    return linear * (2 if is_lora else 3) + 3 * attention + recomputed


def block_bytes_per_token(facts: ModelFacts) -> int:
    """Bytes that one block saves per token for its backward pass, to first order.

    Per norm the float32 input, the float32 normalized value and its cast; queries, keys and values before and after
    rotary and as attention saves them; attention's output; gate, up, activation and product of the MLP.
    """
    norms = 2 * facts.hidden * (4 + 4 + COMPUTE_BYTES)
    attention = (4 * facts.query_width + 6 * facts.key_width) * COMPUTE_BYTES
    mlp = 4 * facts.intermediate * facts.active_experts * COMPUTE_BYTES
    return norms + attention + mlp + 2 * facts.hidden * COMPUTE_BYTES


def memory_gib(facts: ModelFacts, gpus: int, context: int, parts: int, *, is_lora: bool) -> float:
    """Peak of one GPU: parameters over all GPUs, a sequence over `parts` of them, checkpointed activations."""
    tokens = context / parts
    block = facts.block_params / facts.layers
    if is_lora:
        base = facts.block_params / gpus + facts.unsplit_params
        held = COMPUTE_BYTES * base + (COMPUTE_BYTES + 4 + 4 + 8) * facts.lora_params(LORA)
    else:  # one GPU computes with a bf16 copy of its float32 masters; shards are masters, cast as they are gathered
        held = facts.params * ((COMPUTE_BYTES + 16) if gpus == 1 else 16 / gpus)
    if gpus > 1:  # this block and the next; with full parameters embedding and head, and gradients before the scatter
        gathered = 2 * block + (0.0 if is_lora else facts.embedding_params)
        held += gathered * COMPUTE_BYTES
        held += 0.0 if is_lora else (block + facts.embedding_params) * 4
    held += tokens * (facts.layers * facts.hidden * COMPUTE_BYTES + block_bytes_per_token(facts))
    held += HEAD_TILE_ROWS * facts.vocab * (COMPUTE_BYTES + 4 + 4)
    if parts > 1:  # keys and values of a layer for the whole sequence, and their gradients
        held += 2 * context * 2 * facts.key_width * COMPUTE_BYTES
    return held / GIB * (1 + FRAGMENTATION_FRAC) + PROCESS_GIB["cuda"]


@dataclass(frozen=True)
class Step:
    """A step in which every GPU computes one micro-batch: its part of one sequence."""

    parts: int
    """GPUs that share a sequence."""
    sequences: float
    """In the step, over all GPUs."""
    memory_gib: float
    received: float
    """Bytes per GPU."""
    communication_s: float
    compute_s: float

    @property
    def fits(self) -> bool:
        """Whether an H100 holds it."""
        return self.memory_gib <= GPU_GIB


def step(facts: ModelFacts, gpus: int, context: int, *, is_lora: bool) -> Step:
    """The layout with the fewest GPUs per sequence that fits; if none does, the one with the most."""
    parts = 1
    while parts < gpus and memory_gib(facts, gpus, context, parts, is_lora=is_lora) > GPU_GIB:
        parts *= 2
    weights = block_bytes(facts, gpus) + adapter_bytes(facts, gpus) if is_lora else full_bytes(facts, gpus)
    keys = context_bytes(facts, context, parts)
    return Step(
        parts=parts,
        sequences=gpus / parts,
        memory_gib=memory_gib(facts, gpus, context, parts, is_lora=is_lora),
        received=weights + keys,
        communication_s=weights / bandwidth(gpus) + keys / bandwidth(parts),
        compute_s=context / parts * flops_per_token(facts, context, is_lora=is_lora) / FLOPS,
    )


def hiding_tokens(received: float, facts: ModelFacts, *, is_lora: bool, rate: float, context: int = 8_192) -> float:
    """Tokens per GPU and micro-batch whose computation takes as long as receiving `received` bytes."""
    return received / rate * FLOPS / flops_per_token(facts, context, is_lora=is_lora)


def hiding_context(facts: ModelFacts, parts: int, rate: float) -> float:
    """Tokens of a sequence from which its attention alone hides the exchange of its keys and values.

    Both are per sequence and GPU; compute grows with the square of the context, bytes with the context.
    """
    attention = (3 + 1) * 2.0 * facts.layers * facts.query_width / parts / FLOPS
    return context_bytes(facts, 1_000_000, parts) / 1e6 / rate / attention


def step_table(name: str, *, is_lora: bool) -> str:
    """Memory, bytes and seconds by GPUs and context."""
    names = ("GPUs", "context", "GPUs per sequence", "sequences", "GiB per GPU", "GB received per GPU")
    names += ("communication s", "compute s", "ratio")
    lines = [f"| {' | '.join(names)} |", "|---:" * len(names) + "|"]
    for gpus in GPUS:
        for context in CONTEXTS:
            made = step(model(name), gpus, context, is_lora=is_lora)
            cells = [f"{gpus:,}", f"{context // 1024:,}k", f"{made.parts:,}", f"{made.sequences:,.0f}"]
            cells.append(f"{made.memory_gib:,.0f}")
            if made.fits:
                cells += [f"{made.received / 1e9:,.1f}", f"{made.communication_s:,.3f}", f"{made.compute_s:,.2f}"]
                cells.append(f"{made.communication_s / made.compute_s:.3f}")
            else:
                cells += ["does not fit", "", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def hiding_table() -> str:
    """Tokens per GPU and micro-batch at which communication takes as long as computing."""
    names = ("model, training", "GB received by each of 64 GPUs", "per", "8 GPUs, NVLink")
    names += ("64 GPUs, 8 adapters a node", "64 GPUs, one adapter")
    lines = [f"| {' | '.join(names)} |", "|---|---:|---|---:|---:|---:|"]
    kinds: list[tuple[str, str, bool, Callable[[ModelFacts, int], float]]] = [
        ("LoRA, whole base on each GPU", "step", True, adapter_bytes),
        ("LoRA, sharded base", "micro-batch", True, block_bytes),
        ("full, sharded", "micro-batch", False, full_bytes),
    ]
    for name in CARDS:
        facts = model(name)
        for kind, per, is_lora, received in kinds:
            cells = [
                hiding_tokens(received(facts, gpus), facts, is_lora=is_lora, rate=rate)
                for gpus, rate in ((8, NVLINK), (64, bandwidth(64)), (64, ADAPTER))
            ]
            shown = " | ".join(f"{tokens:,.0f}" for tokens in cells)
            lines.append(f"| {name} {kind} | {received(facts, 64) / 1e9:,.2f} | {per} | {shown} |")
    return "\n".join(lines)


def context_table() -> str:
    """Bytes of keys and values, and the context from which attention hides them."""
    lines = [
        "| model | bytes per token | GPUs per sequence | NVLink | 8 adapters a node | one adapter |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in CARDS:
        facts = model(name)
        width = 2 * facts.layers * facts.key_width * COMPUTE_BYTES
        for parts in (8, 16, 64):
            nvlink = f"{hiding_context(facts, parts, NVLINK):,.0f}" if parts <= NODE else "-"
            others = " | ".join(f"{hiding_context(facts, parts, rate):,.0f}" for rate in (bandwidth(64), ADAPTER))
            lines.append(f"| {name} | {width / 1024:,.0f} KiB | {parts} | {nvlink} | {others} |")
    return "\n".join(lines)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "hiding": hiding_table,
    "context": context_table,
    **{f"{name} LoRA": partial(step_table, name, is_lora=True) for name in CARDS},
    **{f"{name} full": partial(step_table, name, is_lora=False) for name in CARDS},
}


def filled(page: str) -> str:
    """The page with every table between its two marks recomputed.

    Raises:
        ValueError: a table has no place in the page.
    """
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = place.subn(rf"\g<1>{make()}\n\g<2>", page)
        if found != 1:
            raise ValueError(f"{PAGE}: the marks of table {name!r} are there {found} times, not once")
    return page


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if arguments.check and before != after:
        print(f"{PAGE}: tables are not what the formulas say; run scripts/scaling_table.py")
        return 1
    if before != after:
        PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
