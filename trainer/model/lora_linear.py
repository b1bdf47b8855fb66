"""The LoRA linear layer as one fused operation, for one adapter or several in one pack.

    y = W x + b + scaling * B (A x)

The adapter's product is accumulated into the output of the base product, forward and backward; only x and A x are kept.
PEFT creates the layer and owns its parameters. Its own forward runs where the formula differs (DoRA, dropout while
training) and where the adapter is merged or disabled.

With several adapters, the base product runs on the whole pack and each adapter's products on the rows of its tokens,
gathered. Each row is computed as in a pack that holds this adapter's sequences alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, final

import peft
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.autograd.function import once_differentiable

from trainer.errors import ModelError
from trainer.model.batch import TokenOwners


@final
class Routing:
    """The token owners of the pack that is in the model; shared by the policy and its LoRA layers."""

    def __init__(self) -> None:
        """Start without owners: all tokens use the active adapter."""
        self.owners: TokenOwners | None = None

    @contextmanager
    def of(self, owners: TokenOwners | None) -> Iterator[None]:
        """Route the tokens of a forward pass within the block."""
        previous, self.owners = self.owners, owners
        try:
            yield
        finally:
            self.owners = previous

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of gradient checkpointing: recomputation, in the backward pass, routes as forward did."""
        return nullcontext(), self.of(self.owners)


@final
class FusedLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer with the fused product in front."""

    routing: Routing | None = None
    """Set by `Adapters`; None outside a policy."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """W x + b + scaling * B A x of [..., in].

        Raises:
            ModelError: a pack has several owners, and the layer or one of their adapters does not support it.
        """
        if self.routing is not None and self.routing.owners is not None and not self.disable_adapters:
            return self._routed(x, self.routing.owners)
        names = self.active_adapters
        if args or kwargs or len(names) != 1 or not self._is_plain(names[0]):
            return super().forward(x, *args, **kwargs)
        name, base = names[0], self.base_layer
        return LoraProduct.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _routed(self, x: torch.Tensor, owners: TokenOwners) -> torch.Tensor:
        if x.numel() != owners.num_tokens * x.shape[-1]:
            raise ModelError(
                f"a layer gets {x.numel() // x.shape[-1]} of the pack's {owners.num_tokens} tokens: layers that see "
                "only a part of the pack, such as experts, do not support packs of several adapters"
            )
        parts, tensors = [], []
        for name, rows in owners.rows.items():
            if name in self.lora_A:
                if not self._is_plain(name):
                    raise ModelError(f"adapter {name}: DoRA and dropout are not supported in packs of several adapters")
                parts.append(_Part(rows, self.scaling[name]))
                tensors += [self.lora_A[name].weight, self.lora_B[name].weight]
        base = self.base_layer
        output: torch.Tensor = RoutedLoraProduct.apply(x, base.weight, base.bias, parts, *tensors)  # type: ignore[no-untyped-call]
        return output

    def _is_plain(self, name: str) -> bool:
        """Whether this adapter computes the formula above at present."""
        return (
            name in self.lora_A
            and not self.disable_adapters
            and not self.merged
            and name not in self.lora_variant
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
            and not self.base_layer.weight.requires_grad
            and self.base_layer.weight.dtype == self.lora_A[name].weight.dtype
        )


def use_fused_linear(config: peft.LoraConfig) -> None:
    """Let PEFT create the fused layer for every plain linear layer."""
    config._register_custom_module({nn.Linear: FusedLinear})


def _shaped_as(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[T, out] as [..., out], not as a view: some models (Gemma 3n) write into the output of a layer."""
    shaped: torch.Tensor = torch.ops.aten._unsafe_view.default(flat, [*x.shape[:-1], flat.shape[-1]])
    return shaped


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
        """Compute y.

        Args:
            ctx: of autograd.
            x: [..., in].
            weight: [out, in] of the base layer.
            bias: [out] or None.
            down: A, [r, in].
            up: B, [out, r].
            scaling: factor of the adapter.
        """
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.T
        y = torch.nn.functional.linear(flat, weight, bias)
        y.addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return _shaped_as(y, x)

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


class _Part(NamedTuple):
    """One adapter's share of a routed product."""

    rows: torch.Tensor
    """[n] positions of its tokens in the pack."""
    scaling: float


@final
class RoutedLoraProduct(torch.autograd.Function):
    """`LoraProduct` where each adapter acts on the rows of its own tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: list[_Part],
        *pairs: torch.Tensor,
    ) -> torch.Tensor:
        """Compute y.

        Args:
            ctx: of autograd.
            x: [..., in], T rows in all.
            weight: [out, in] of the base layer.
            bias: [out] or None.
            parts: rows and scaling of each adapter.
            *pairs: A [r, in] and B [out, r] of each adapter, in turn.
        """
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight, bias)
        inners = []
        for part, down, up in zip(parts, pairs[::2], pairs[1::2], strict=True):
            inners.append(flat[part.rows] @ down.T)
            y[part.rows] = y[part.rows].addmm_(inners[-1], up.T, alpha=part.scaling)
        ctx.save_for_backward(flat, weight, *inners, *pairs)
        ctx.parts, ctx.shape = parts, x.shape
        return _shaped_as(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of each A and B; the base weight is frozen."""
        flat, weight, *saved = ctx.saved_tensors
        inners, pairs = saved[: len(ctx.parts)], saved[len(ctx.parts) :]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_pairs: list[torch.Tensor | None] = []
        for part, inner, down, up in zip(ctx.parts, inners, pairs[::2], pairs[1::2], strict=True):
            own = grad[part.rows]
            grad_inner = (own @ up).mul_(part.scaling)
            if grad_x is not None:
                grad_x[part.rows] = grad_x[part.rows].addmm_(grad_inner, down)
            needs_down, needs_up = ctx.needs_input_grad[4 + len(grad_pairs) : 6 + len(grad_pairs)]
            grad_pairs.append(grad_inner.T @ flat[part.rows] if needs_down else None)
            grad_pairs.append((own.T @ inner).mul_(part.scaling) if needs_up else None)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *grad_pairs
