"""What thin.py computes, in torch's operators: on CPUs, and where the kernels do not apply. Arguments are the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def columns_of(
    y: torch.Tensor, inner: torch.Tensor, ups: Sequence[torch.Tensor]
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """The columns of y and of A x that belong to each layer, as views.

    Args:
        y: [T, sum of out_i].
        inner: [T, sum of r_i].
        ups: B_i, [out_i, r_i].
    """
    return y.split([up.shape[0] for up in ups], 1), inner.split([up.shape[1] for up in ups], 1)


def thin_gradients(
    grad: torch.Tensor, inner: torch.Tensor, ups: Sequence[torch.Tensor], scalings: Sequence[float]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`thin.thin_gradients`; ranks may differ."""
    grad_inner, grad_ups = torch.empty_like(inner), []
    of_layers = zip(*columns_of(grad, inner, ups), columns_of(grad, grad_inner, ups)[1], ups, scalings, strict=True)
    for columns, own, own_grad, up, scaling in of_layers:
        torch.mm(columns, up, out=own_grad).mul_(scaling)
        grad_ups.append((columns.T @ own).mul_(scaling))
    return grad_inner, grad_ups


def swiglu(
    both: torch.Tensor,
    inner: torch.Tensor,
    ups: tuple[torch.Tensor, torch.Tensor],
    down: torch.Tensor,
    scalings: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`thin.swiglu`."""
    gate, up = _adapted(both, inner, ups, scalings)
    hidden = nn.functional.silu(gate) * up
    return hidden, hidden @ down.T


def swiglu_gradients(
    grad: torch.Tensor,
    both: torch.Tensor,
    inner: torch.Tensor,
    last_inner: torch.Tensor,
    ups: tuple[torch.Tensor, torch.Tensor],
    down: torch.Tensor,
    scalings: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`thin.swiglu_gradients`."""
    gate, up = _adapted(both, inner, ups, scalings)
    grad = torch.addmm(grad, last_inner, down)
    silu = nn.functional.silu(gate)
    grad_gate: torch.Tensor = torch.ops.aten.silu_backward(grad * up, gate)
    grad_both = torch.cat([grad_gate, grad * silu], 1)
    grad_inner, grad_ups = thin_gradients(grad_both, inner, ups, scalings)
    return grad_both, grad_inner, grad_ups[0], grad_ups[1], last_inner.T @ (silu * up)


def _adapted(
    both: torch.Tensor, inner: torch.Tensor, ups: Sequence[torch.Tensor], scalings: Sequence[float]
) -> list[torch.Tensor]:
    parts = zip(*columns_of(both, inner, ups), ups, scalings, strict=True)
    return [torch.addmm(base, own, up.T, alpha=scaling) for base, own, up, scaling in parts]
