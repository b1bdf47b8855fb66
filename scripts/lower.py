"""Compile what a GPU would run, without a GPU, down to machine code; write what each kernel needs of the card.

Exit code 1 if a kernel needs more shared memory than a thread block of the card can have, or does not compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

TRITON: Final = "triton==3.7.1"
"""The version that torch 2.13 is built with."""
PARTS: Final = ("attention", "flash", "layers", "adapters", "head")
VOCABULARIES: Final = ((128_256, None), (151_936, None), (262_144, None), (256_000, 30.0))
"""Llama 3, Qwen, Gemma 3, and Gemma 2 with its soft cap."""

Rows = Iterator[dict[str, Any]]


def attention_rows(card: Any, only: Sequence[str]) -> Rows:
    """The kernels of each geometry: forward, backward and without gradient."""
    from geometries import GEOMETRIES, programs_of

    for geometry in GEOMETRIES:
        if any(words in geometry.name for words in only):
            for program in programs_of(geometry, card):
                yield from kernel_rows(geometry.name, program, card)


def flash_rows(card: Any, only: Sequence[str]) -> Rows:
    """The kernels of FlashAttention-4 for each geometry of packs, which it does not take on every card."""
    from geometries import GEOMETRIES, PACK
    from lowered_flash import NoKernelError, flash_cubins, is_installed

    if not is_installed() or card.capability < (9, 0):  # it has no backward pass for earlier cards
        reason = "it is not for this card" if is_installed() else "it needs scripts/setup_flash"
        sys.stderr.write(f"flash: left out, {reason}\n")
        return
    for geometry in (each for each in GEOMETRIES if each.lengths == PACK):
        for is_causal in (True, False):
            name = f"flash-attn-4 {geometry.name}{'' if is_causal else ' to prefixes'}"
            has_branches = geometry.window is None and not geometry.has_sinks
            if (not is_causal and not has_branches) or not any(words in name for words in only):
                continue
            sys.stderr.write(f"{name}\n")
            try:
                found = list(flash_cubins(geometry, card, is_causal=is_causal))
            except NoKernelError as error:
                yield {"of": name, "refused": str(error)}
                continue
            for kind, cubin in found:
                yield {"of": name, "pass": kind, **dataclasses.asdict(cubin)}


def layer_rows(card: Any, only: Sequence[str]) -> Rows:
    """The kernels of decoder layers with LoRA of rank 16 and with full parameters, 4 documents of 1,024 tokens."""
    from lowered_layers import LAYERS, foreign_addmms, lowered_layer

    from trainer.config.recipe import LoraSettings

    for name, layer in LAYERS.items():
        for kind, lora in (("LoRA", LoraSettings(rank=16)), ("full", None)):
            if not any(words in f"{name} {kind}" for words in only):
                continue
            programs, launches = lowered_layer(layer, lora, [1024] * 4, card)
            for program, launched in zip(programs, launches, strict=True):
                yield from kernel_rows(f"{name} {kind}", program, card)
                yield {
                    "of": f"{name} {kind}",
                    "pass": program.kind,
                    "triton_launches": sum(each.is_triton for each in launched),
                    "launches": sum(len(each.kernels) for each in launched),
                    "gigabytes": sum(kernel.num_bytes for each in launched for kernel in each.kernels) / 1e9,
                    "narrow_gigabytes": sum(
                        kernel.num_bytes
                        for each in launched
                        for kernel in each.kernels
                        if not kernel.is_base and "_tem_" not in kernel.name
                    )
                    / 1e9,
                    "foreign_addmms": len(foreign_addmms(program)),
                }


def adapter_rows(card: Any, only: Sequence[str]) -> Rows:
    """The kernels of adapters' products, for three ranks, and for many tokens."""
    from lowered_thin import CASES, thin_cubins

    for rank, tokens in CASES:
        of = f"adapters of rank {rank}, {tokens:,} tokens"
        if any(words in of for words in only):
            sys.stderr.write(f"{of}\n")
            for cubin in thin_cubins(rank, tokens, card):
                yield {"of": of, "pass": cubin.kernel, **dataclasses.asdict(cubin)}


def head_rows(card: Any, only: Sequence[str]) -> Rows:
    """The kernels of the head's statistics."""
    from lowered_layers import lowered_statistics

    for vocab, softcap in VOCABULARIES:
        for with_entropy in (False, True):
            name = f"head {vocab}{' cap' if softcap else ''}{' entropy' if with_entropy else ''}"
            if any(words in name for words in only):
                program = lowered_statistics(vocab, card, softcap=softcap, with_entropy=with_entropy)
                yield from kernel_rows(name, program, card)


def kernel_rows(of: str, program: Any, card: Any) -> Rows:
    """A row for each kernel of a program in each configuration."""
    from lowered_kernels import cubins

    sys.stderr.write(f"{of}, {program.kind}\n")
    for cubin in cubins(program, card):
        yield {"of": of, "pass": program.kind, **dataclasses.asdict(cubin)}


def table_lines(rows: list[dict[str, Any]], card_name: str, card: Any) -> list[str]:
    """The rows as Markdown: kernels with products, layers, and the largest of all others."""
    heavy = [row for row in rows if row.get("tensor_cores")]
    light = [row for row in rows if "kernel" in row and not row["tensor_cores"]]
    lines = [
        f"# Kernels compiled for {card_name}",
        "",
        f"`scripts/lower --card {card_name}`, without a GPU: Inductor of torch and {TRITON}, down to machine code.",
        f"A thread block can have {card.shared_bytes:,} bytes of shared memory. Spilled: bytes that a thread keeps in",
        "local memory for want of registers. Nothing here was run or timed.",
        "",
        "| matrix products of | pass | warps | shared bytes | registers | spilled bytes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in heavy:
        warps = row["config"].rpartition("=")[2]
        lines.append(
            f"| {row['of']} | {row['pass']} | {warps} | {row['shared_bytes']:,} | {row['registers']} "
            f"| {row['spilled_bytes']:,} |"
        )
    refused = [row for row in rows if "refused" in row]
    lines += ["", *(f"Not compiled: {row['of']}: {row['refused']}" for row in refused)] if refused else []
    layers = [row for row in rows if "launches" in row]
    if layers:
        lines += ["", "| layer, 4,096 tokens | pass | Triton kernels | all kernels | GB | addmm into another buffer |"]
        lines += ["|---|---|---:|---:|---:|---:|"]
        lines += [
            f"| {row['of']} | {row['pass']} | {row['triton_launches']} | {row['launches']} | {row['gigabytes']:.2f} "
            f"| {row['foreign_addmms']} |"
            for row in layers
        ]
    if light:
        lines += [
            "",
            f"{len(light)} other kernels and configurations need at most {max(row['shared_bytes'] for row in light):,} "
            f"bytes of shared memory and spill at most {max(row['spilled_bytes'] for row in light):,}.",
        ]
    return [*lines, ""]


def main(argv: list[str] | None = None) -> int:
    """Lower the chosen parts and write the table."""
    parser = argparse.ArgumentParser(prog="scripts/lower", description=__doc__)
    parser.add_argument("--card", default="sm_90", choices=("sm_80", "sm_90", "sm_100"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--only", nargs="+", default=[""], help="words in the names of geometries, layers or heads")
    parser.add_argument("--out", type=Path, help="Markdown; standard output without it")
    parser.add_argument("--json", type=Path, help="the rows as JSON")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        sys.stderr.write("scripts/lower needs Triton: scripts/setup_triton\n")
        return 2
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)

    from lowering import CARDS

    card = CARDS[arguments.card]
    makers = {
        "attention": attention_rows,
        "flash": flash_rows,
        "layers": layer_rows,
        "adapters": adapter_rows,
        "head": head_rows,
    }
    rows = []
    for part in arguments.parts:
        for row in makers[part](card, arguments.only):
            rows.append(row)
            if arguments.json is not None:  # each time, so that an interrupted call leaves what it found
                arguments.json.write_text("[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")
    if not rows:
        parser.error(f"--only {' '.join(arguments.only)}: nothing has these words in its name")
    text = "\n".join(table_lines(rows, arguments.card, card))
    if arguments.out is not None:
        arguments.out.write_text(text)
    else:
        sys.stdout.write(text)
    too_large = [row for row in rows if row.get("shared_bytes", 0) > card.shared_bytes]
    for row in too_large:
        sys.stderr.write(
            f"{row['of']}, {row['pass']}, {row['kernel']}: {row['shared_bytes']:,} bytes of shared memory\n"
        )
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
