"""Sums of named values over ranks."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.distributed.world import World


def sum_by_name(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Sum each value over ranks, by its name; a rank that lacks a name adds 0. Every rank calls it.

    >>> import torch
    >>> sum_by_name({"rollouts": 8.0, "failed": 1.0}, World(rank=0, size=1, device=torch.device("cpu")))
    {'failed': 1.0, 'rollouts': 8.0}
    """
    names = sorted({name for names in world.gather(sorted(values)) for name in names})
    return dict(zip(names, world.sum_of([float(values.get(name, 0.0)) for name in names]), strict=True))
