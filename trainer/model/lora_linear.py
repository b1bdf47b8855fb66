"""A LoRA linear layer as one operation: fewer passes over memory than PEFT's, same parameters.

    y = W x + b + scaling * B (A x)

The adapter's product is added inside the matrix product that makes it, forward and backward, and only x and A x are
kept. PEFT creates the layer and owns its parameters; where anything but this formula is asked for (DoRA, dropout while
learning, a merged or switched-off adapter), PEFT's own forward runs.
"""

from __future__ import annotations

from typing import Any, Final, final

import peft
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

ADAPTER: Final = "default"


@final
class FusedLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer with the fused product in front."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """W x + b + scaling * B A x of [..., in]."""
        if args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return LoraProduct.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
        )

    def _is_plain(self) -> bool:
        dropout = self.lora_dropout[ADAPTER]
        return (
            not self.disable_adapters
            and not self.merged
            and self.active_adapters == [ADAPTER]
            and not self.lora_variant
            and (isinstance(dropout, nn.Identity) or not self.training)
            and not self.base_layer.weight.requires_grad
            and self.base_layer.weight.dtype == self.lora_A[ADAPTER].weight.dtype
        )


def use_fused_linear(config: peft.LoraConfig) -> None:
    """Let PEFT make the fused layer of every plain linear layer."""
    config._register_custom_module({nn.Linear: FusedLinear})


@final
class LoraProduct(torch.autograd.Function):
    """y = W x + b + scaling * B (A x), with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Args: x [..., in], weight [out, in], bias [out] or None, down A [r, in], up B [out, r]."""
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.T
        y = torch.nn.functional.linear(flat, weight, bias)
        y.addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; the base weight is frozen."""
        flat, inner, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ up).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_inner, down)
            grad_x = grad_x.view(ctx.shape)
        grad_down = grad_inner.T @ flat if ctx.needs_input_grad[3] else None
        grad_up = (grad.T @ inner).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_down, grad_up, None
