"""CPU time on the host of making a pack of 16,384 tokens for a GPU; needs no GPU.

    python benchmarks/pack_cost.py          prints milliseconds of CPU time, the median of 21 packs

The pack is made on torch's meta device: everything but the copies is computed. Run it with PYTHONPATH set to another
checkout to compare.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model import batch, layout
from trainer.model.batch import Batch, Tree

TOKENS = 16_384
VOCAB = 150_000
PROMPT = 256


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for module in (batch, layout):  # a copy to the meta device is none
        if hasattr(module, "to_device"):
            module.to_device = lambda tensor, _device: tensor
    print(f"load {os.getloadavg()[0]:.1f}; milliseconds of CPU time")
    device = torch.device("meta")
    for name, trees in _packs().items():
        made = Batch.pack_trees(trees, device)
        mask = _milliseconds(lambda pack=made: pack.layout.coordinates())
        print(f"{name:32} pack {_milliseconds(lambda of=trees: Batch.pack_trees(of, device)):6.2f}, then {mask:.2f}")


def _packs() -> dict[str, list[Tree]]:
    generator = np.random.default_rng(0)
    packs = {
        f"{TOKENS // length} rows of {length}": [
            Tree.of_one(_sequence(generator, length, length * 3 // 4)) for _ in range(TOKENS // length)
        ]
        for length in (2048, 128)
    }
    shared = tuple(generator.integers(0, VOCAB, PROMPT).tolist())
    branches = [_sequence(generator, 256, 256, shared) for _ in range(63)]
    return packs | {f"prompt of {PROMPT}, 63 branches": [Tree(tuple(branches), PROMPT)]}


def _sequence(generator: np.random.Generator, length: int, trained: int, before: tuple[int, ...] = ()) -> TokenSequence:
    tokens = before + tuple(generator.integers(0, VOCAB, length).tolist())
    mask = (False,) * (len(tokens) - trained) + (True,) * trained
    return TokenSequence(tokens, mask, TokenInputs(weights=(1.0,) * trained), "rows.jsonl:1")


def _milliseconds(make: Callable[[], object]) -> float:
    times = []
    for _ in range(21):
        begin = time.process_time()
        make()
        times.append(1e3 * (time.process_time() - begin))
    return statistics.median(times)


if __name__ == "__main__":
    main()
