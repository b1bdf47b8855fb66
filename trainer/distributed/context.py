"""Context parallelism: neighbouring ranks that compute one pack together, and the exchange of their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

OPERATORS: Final = torch.ops._c10d_functional
"""The collectives below `torch.distributed`, whose functions have other names from torch 2.13 on; the old ones warn."""


@final
@dataclass(frozen=True)
class ContextGroup:
    """The ranks that have the same packs, each a slice of every pack."""

    rank: int
    """Place of this rank in the group, from 0."""
    size: int
    group: distributed.ProcessGroup

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """The slices of all ranks, in order of ranks; the gradient is summed over the ranks in float32.

        Every rank of the group calls it, and runs its backward pass, in the same order.

        Args:
            own: [t, ...] this rank's slice; all ranks have equally many tokens.

        Returns:
            [size * t, ...].
        """
        whole: torch.Tensor = _Gathered.apply(own, self)  # type: ignore[no-untyped-call]
        return whole


class _Gathered(torch.autograd.Function):
    """All-gather; its gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, ranks: ContextGroup) -> torch.Tensor:
        ctx.ranks = ranks
        whole = OPERATORS.all_gather_into_tensor(own.contiguous(), ranks.size, ranks.group.group_name)
        gathered: torch.Tensor = OPERATORS.wait_tensor(whole)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks: ContextGroup = ctx.ranks
        summed = torch.promote_types(grad.dtype, torch.float32)  # partial sums rounded to bfloat16 would add up
        grad_sums = grad.to(summed).contiguous()
        own = OPERATORS.reduce_scatter_tensor(grad_sums, "sum", ranks.size, ranks.group.group_name)
        return OPERATORS.wait_tensor(own).to(grad.dtype), None
