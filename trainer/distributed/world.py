"""The ranks of an attempt and the collectives that training needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, TypeVar, final

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.distributed.context import ContextGroup
from trainer.errors import LaunchError

T = TypeVar("T")

MIN_COLLECTIVE_TIMEOUT_S: Final = 1800.0
LOCAL: Final = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
"""Variables that launchers set, and their values without a launcher."""


@final
@dataclass(frozen=True)
class World:
    """The ranks of this attempt."""

    rank: int
    size: int
    device: torch.device
    group: distributed.ProcessGroup | None = None
    """None: torch's default process group."""
    mesh: DeviceMesh | None = None
    """The mesh that the base model is sharded over; None: every rank has the whole model. With copies of the model it
    has two dimensions, copies and shards."""
    copies: int = 1
    """Number of sharded copies of the base model."""
    local_rank: int = 0
    """Rank on this machine."""
    local_size: int = 1
    """Number of ranks on this machine."""
    context: ContextGroup | None = None
    """The ranks that compute the same packs as this one; None: every rank has packs of its own."""

    @property
    def num_shares(self) -> int:
        """Number of parts that the rows of a step are dealt into: of ranks, or of groups that share their packs."""
        return self.size // (1 if self.context is None else self.context.size)

    @property
    def share(self) -> int:
        """The part of this rank, from 0."""
        return self.rank // (1 if self.context is None else self.context.size)

    @property
    def counts_share(self) -> bool:
        """Whether this rank adds what its group has in common to a sum over all ranks; one rank of a group does."""
        return self.context is None or self.context.rank == 0

    @property
    def runs_in_step(self) -> bool:
        """Whether ranks wait for each other inside a pass, so that none can leave out a pass by itself."""
        return self.mesh is not None or self.context is not None

    def apart(self) -> World:
        """The same ranks with a gloo group of their own, for a thread beside the training; every rank calls it."""
        return self if self.size == 1 else replace(self, group=distributed.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints messages."""
        return self.rank == 0

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over ranks; every rank gets the same bits."""
        if self.size > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=self.group)

    def max_of(self, values: Sequence[float]) -> list[float]:
        """Elementwise maximum over ranks of a few numbers on the host."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def sum_of(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over ranks of a few numbers on the host."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM, group=self.group)
        return tensor.tolist()

    def sum_by_name(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks of named numbers; a rank that lacks a name counts as 0. Every rank gets all names.

        With {"loss": 1.0, "tokens": 3.0} on one rank and {"tokens": 0.0} on another: {"loss": 1.0, "tokens": 3.0}.
        """
        names = list(dict.fromkeys(name for part in self.gather(list(values)) for name in part))
        return dict(zip(names, self.sum_of([values.get(name, 0.0) for name in names]), strict=True))

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_main(self, act: Callable[[], T], errors: tuple[type[Exception], ...]) -> tuple[T | None, str | None]:
        """Call a function on the main rank only; every rank gets its result or its error, and none waits for ever.

        Args:
            act: called on the main rank.
            errors: exceptions that become a message; others are raised on the main rank only.

        Returns:
            The result, and None; or None, and the message of the error.
        """
        result: T | None = None
        problem: str | None = None
        if self.is_main:
            try:
                result = act()
            except errors as error:
                problem = str(error)
        shared: tuple[T | None, str | None] = self.from_main((result, problem))
        return shared

    def num_dummies(self, counts: Sequence[int]) -> list[int]:
        """Number of dummy passes that this rank must add to match the busiest rank, for each count.

        Sharded parameters are gathered by all ranks together, so all ranks must run the same number of passes. Without
        sharding it is 0. With counts of 3 here and 5 on another rank: 2 here, 0 there.
        """
        if self.mesh is None:
            return [0] * len(counts)
        most = self.max_of([float(count) for count in counts])
        return [int(maximum) - count for maximum, count in zip(most, counts, strict=True)]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block on one rank of each machine after another, to limit peak host memory."""
        for turn in range(self.local_size):
            if turn == self.local_rank:
                yield
            self.barrier()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            distributed.barrier(group=self.group)


def collective_timeout_s(hang_timeout_s: float) -> float:
    """How long a collective waits: longer than a hung rank may stand still, so that its watchdog speaks first.

    >>> collective_timeout_s(60.0), collective_timeout_s(1800.0)
    (1800.0, 3600.0)
    """
    return max(MIN_COLLECTIVE_TIMEOUT_S, 2.0 * hang_timeout_s)


def join_world(
    device: str,
    expected_size: int,
    *,
    num_shards: int = 1,
    context_size: int = 1,
    hang_timeout_s: float = MIN_COLLECTIVE_TIMEOUT_S,
) -> World:
    """Join the ranks that the launcher started.

    Args:
        device: cpu or cuda.
        expected_size: ranks of the shape.
        num_shards: neighbouring ranks that hold one copy of the base model together; divides the number of ranks.
        context_size: neighbouring ranks that compute one pack together; divides the number of ranks.
        hang_timeout_s: how long a rank may make no progress.

    Raises:
        LaunchError: the number of ranks that the launcher started is not the shape's.
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
        own_device = torch.device("cuda", _own_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
        torch.cuda.set_device(own_device)
    else:
        own_device = torch.device("cpu")
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = timedelta(seconds=collective_timeout_s(hang_timeout_s))
        distributed.init_process_group(backend, timeout=timeout)
    copies, mesh = 1, None
    if num_shards > 1:
        copies = size // num_shards
        shape, names = ((size,), ("ranks",)) if copies == 1 else ((copies, num_shards), ("copies", "shards"))
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    local_rank, local_size = (int(os.environ.get(name, default)) for name, default in LOCAL)
    return World(
        rank,
        size,
        own_device,
        mesh=mesh,
        copies=copies,
        local_rank=local_rank,
        local_size=min(size, local_size),
        context=_context_of(rank, context_size, hang_timeout_s) if context_size > 1 else None,
    )


def _context_of(rank: int, size: int, hang_timeout_s: float) -> ContextGroup:
    """The group of `size` neighbouring ranks that this one is in; every rank calls it."""
    timeout = timedelta(seconds=collective_timeout_s(hang_timeout_s))
    group, _ = distributed.new_subgroups(size, timeout=timeout)
    assert group is not None, "every rank is in one of the groups"
    return ContextGroup(rank % size, size, group)


def use_deterministic_kernels() -> None:
    """Let torch refuse operations without a deterministic kernel; before the first use of the GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS may otherwise choose another kernel in each process
    torch.use_deterministic_algorithms(True)


def _own_gpu(local_rank: int, visible: int) -> int:
    """Index of a rank's GPU; 0 where the launcher shows each rank its own GPU only.

    Args:
        local_rank: on this machine.
        visible: GPUs that this process sees.

    Raises:
        LaunchError: there are fewer GPUs than ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise LaunchError(
            f"rank {local_rank} of this machine has no GPU: {visible} are visible. Launch as many processes as GPUs, "
            "or show each process its own one."
        )
    return local_rank


def leave_world(world: World) -> None:
    """Destroy the process group, if there is one."""
    if world.size > 1:
        distributed.destroy_process_group()
