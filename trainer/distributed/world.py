"""Ranks: who we are, and the few collectives that training needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, final

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import LaunchError

LOCAL: Final = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
"""What launchers set, and what holds without one."""


@final
@dataclass(frozen=True)
class World:
    """The ranks of this attempt."""

    rank: int
    size: int
    device: torch.device
    group: distributed.ProcessGroup | None = None
    """None: the group of the training's own collectives."""
    mesh: DeviceMesh | None = None
    """Over which the base model's parameters are split; None where every rank has them whole."""
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_size: int = 1

    def apart(self) -> World:
        """The same ranks on a gloo group of their own, for a thread beside the training; every rank calls it."""
        return self if self.size == 1 else replace(self, group=distributed.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.rank == 0

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Sum over ranks; every rank gets the same bits."""
        if self.size > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=self.group)

    def max_of(self, values: Sequence[float]) -> list[float]:
        """Elementwise maximum over ranks of small host-side numbers."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def sum_of(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over ranks of small host-side numbers."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=self.group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def fillers(self, counts: Sequence[int]) -> list[int]:
        """How many forward passes this rank lacks beside the one with the most, for each count.

        Sharded parameters are gathered by all ranks together, so all run equally many passes; elsewhere none lacks.
        """
        if self.mesh is None:
            return [0] * len(counts)
        most = self.max_of([float(count) for count in counts])
        return [int(wanted) - count for wanted, count in zip(most, counts, strict=True)]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """One rank of a machine after another; for what needs much memory for a while."""
        for turn in range(self.local_size):
            if turn == self.local_rank:
                yield
            self.barrier()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            distributed.barrier(group=self.group)


def join_world(device: str, expected_size: int, *, is_sharded: bool = False) -> World:
    """Join the ranks that the launcher started.

    Args:
        device: cpu or cuda.
        expected_size: ranks of the shape.
        is_sharded: whether the shape splits the base model over them.

    Raises:
        LaunchError: the launcher started another number of ranks than the shape has.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if size != expected_size:
        raise LaunchError(
            f"the launcher started {size} rank(s) and the shape has {expected_size}. "
            "Launch with --num_processes of the shape (`trainer check` prints the command), or choose another --shape."
        )
    if device == "cuda":
        if not torch.cuda.is_available():
            raise LaunchError("the shape needs GPUs and torch sees none here; choose `--shape cpu` or another machine")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        where = torch.device("cuda", local)
    else:
        where = torch.device("cpu")
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    mesh = init_device_mesh(device, (size,), mesh_dim_names=("ranks",)) if is_sharded and size > 1 else None
    local_rank, local_size = (int(os.environ.get(name, default)) for name, default in LOCAL)
    return World(rank, size, where, mesh=mesh, local_rank=local_rank, local_size=min(size, local_size))


def leave_world(world: World) -> None:
    """Leave the process group, where there is one."""
    if world.size > 1:
        distributed.destroy_process_group()
