#!/usr/bin/env python
"""Write the limits of configs/shapes/*.yaml: the largest model and the longest row that the memory estimate allows.

python scripts/shape_limits.py            write them
python scripts/shape_limits.py --check    exit 1 if a file has other numbers

A limit refuses what cannot fit whatever else the recipe says; what a recipe needs is estimated for that recipe. So the
largest model is found with gradient checkpointing and one row of 2,048 tokens per device, the longest row with a model
of 0.4 B parameters. Between the models of configs/models/known.yaml a size is the next larger one with fewer layers,
and beyond the largest it is that one with more.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from trainer.config.recipe import SFTRecipe
from trainer.config.shape import TrainingShape
from trainer.planning.memory import estimate_memory
from trainer.planning.model_facts import ModelFacts

ROOT: Final = Path(__file__).resolve().parent.parent
SHAPES: Final = ROOT / "configs" / "shapes"
SHORT_ROW: Final = 2_048
"""Tokens of a row while the largest model is looked for."""
SMALL_LAYERS: Final = 4
"""Layers of the model with which the longest row is looked for: the smallest known one, cut to 0.4 B parameters."""
DEEPER: Final = 8
"""How many times the layers of the largest known model are tried."""
LONGEST_ROW: Final = 131_072
"""No longer row is offered: positions of most models end there."""
KINDS: Final = ("lora", "full")


def cards() -> list[ModelFacts]:
    """The dense models of known.yaml, smallest first."""
    known = yaml.safe_load((ROOT / "configs" / "models" / "known.yaml").read_text(encoding="utf-8"))
    facts = [ModelFacts.from_config(config) for config in known.values()]
    return sorted((each for each in facts if each is not None), key=lambda each: each.params)


def fits(kind: str, shape: TrainingShape, facts: ModelFacts, row_tokens: int) -> bool:
    """Whether the estimate of an SFT recipe with rank 16 or full parameters is within the shape's memory."""
    trained: dict[str, Any] = {"lora": {"rank": 16}} if kind == "lora" else {"lora": None}
    recipe = SFTRecipe.model_validate(
        {
            "name": "limit",
            "method": "sft",
            "model": {"path": "model", "gradient_checkpointing": True},
            "data": {"train": "rows.jsonl", "max_seq_tokens": row_tokens},
            "rows_per_step": shape.num_ranks,
            "steps": 1,
            **trained,
        }
    )
    return estimate_memory(recipe, shape, facts).fits


def largest_b(kind: str, shape: TrainingShape) -> float | None:
    """Parameters in billions of the largest model, to two digits; None if not even one layer of the smallest fits."""
    known, best = cards(), 0.0
    for card in known:
        most = card.layers * (DEEPER if card is known[-1] else 1)
        layers = last_true(partial(_fits_with, kind, shape, card), most)
        if layers:
            best = max(best, replace(card, layers=layers).params / 1e9)
    return float(f"{best:.2g}") if best else None


def _fits_with(kind: str, shape: TrainingShape, card: ModelFacts, layers: int) -> bool:
    return fits(kind, shape, replace(card, layers=layers), SHORT_ROW)


def longest_row(kind: str, shape: TrainingShape) -> int:
    """The longest row in tokens, a power of two."""
    smallest = replace(cards()[0], layers=SMALL_LAYERS)
    powers = [2**exponent for exponent in range(9, LONGEST_ROW.bit_length())]
    return max((tokens for tokens in powers if fits(kind, shape, smallest, tokens)), default=powers[0])


def last_true(holds: Callable[[int], bool], most: int) -> int:
    """The largest number in 1..most for which `holds`, which turns false once; 0 if it never holds.

    >>> last_true(lambda number: number <= 5, 8), last_true(lambda number: False, 8)
    (5, 0)
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def with_limits(text: str) -> str:
    """The text of a shape file with the estimated limits; measured ones stay."""
    shape = TrainingShape.model_validate(yaml.safe_load(text))
    for kind in KINDS:
        limit = getattr(shape.limits, kind)
        if limit is None or limit.basis == "measured":
            continue
        most = largest_b(kind, shape)
        assert most is not None, f"{shape.name}: nothing fits; leave {kind} out"
        line = f"  {kind}: {{max_params_b: {most:g}, max_seq_tokens: {longest_row(kind, shape)}, basis: estimated}}"
        text = re.sub(rf"^  {kind}: .*$", line, text, flags=re.MULTILINE)
    return text


def main() -> int:
    """Write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    drifted = []
    for file in sorted(SHAPES.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        derived = with_limits(text)
        if derived != text:
            drifted.append(file.relative_to(ROOT))
            if not is_check:
                file.write_text(derived, encoding="utf-8")
    for file in drifted:
        print(f"{file}: limits {'differ: run scripts/shape_limits.py' if is_check else 'written'}")
    return 1 if is_check and drifted else 0


if __name__ == "__main__":
    sys.exit(main())
