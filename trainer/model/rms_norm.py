"""RMS norm as one fused operation that saves memory.

It keeps its input and one number per token, where autograd keeps float32 copies of the input:

    y = w * round(x r),  r = (mean(x^2) + eps)^(-1/2)
    d x = r (u - n mean(u n)),  n = x r,  u = w dy                                (arXiv 1910.07467)

Statistics are float32, and the product is rounded to the compute dtype before the weight is applied, as in Llama. An
instance of each norm class of a model is compared with ours once; the class is replaced if all bits are equal.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable

WIDTH: Final = 64
"""Hidden size of the trial instance."""


@final
class RmsNorm(nn.Module):
    """Replaces a norm of a model: same parameter, same values."""

    def __init__(self, source: Any) -> None:
        """Take the weight and epsilon of a module whose class `is_same` accepts."""
        super().__init__()
        self.weight = source.weight
        self.variance_epsilon = float(source.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension of [..., H]."""
        normalized: torch.Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return normalized

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{len(self.weight)}, eps={self.variance_epsilon}"


def use_fused_norms(model: nn.Module) -> None:
    """Replace every norm of a model that computes the formula above; values stay identical to the bit."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_same(type(child)):  # type: ignore[arg-type]  # mypy takes the class for an instance, which is not hashable
                setattr(module, name, RmsNorm(child))


@cache
@torch.no_grad()
def is_same(kind: type[nn.Module]) -> bool:
    """Whether a norm class computes the formula above with the same bits, in float32 and in bfloat16."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    with torch.device("cpu"):
        try:
            norm: Any = kind(WIDTH, eps=1e-5)
            theirs = float(norm.variance_epsilon), norm.weight.shape
        except (TypeError, AttributeError):
            return False
        if theirs != (1e-5, (WIDTH,)):
            return False
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, WIDTH, generator=generator) * 3
        weight = torch.randn(WIDTH, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            norm.weight = nn.Parameter(weight.to(dtype))
            if not torch.equal(norm(x.to(dtype)), RmsNorm(norm)(x.to(dtype))):
                return False
    return True


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normalized = x.float() * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized.to(x.dtype)).flatten(0, -2).sum(0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            scaled = (grad * weight).float()
            along = (scaled * normalized).mean(-1, keepdim=True)
            grad_x = scaled.addcmul(normalized, along, value=-1).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None
