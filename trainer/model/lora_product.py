"""The product of a linear layer and its LoRA adapter as one operation, for one adapter or several in one pack.

    y = W x + b + scaling * B (A x)

The adapter's product is accumulated into the output of the base product, forward and backward; only x and A x are kept.

With several adapters, the base product runs on the whole pack and each adapter's products on the rows of its tokens,
gathered. Each row is computed as in a pack that holds this adapter's sequences alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch.autograd.function import once_differentiable

from trainer.model.thin_choice import products_for


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
        y, inner = _product(x, weight, bias, down, up, scaling)
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; the base weight is frozen."""
        x, inner, weight, down, up = ctx.saved_tensors
        needs_x, _, _, needs_down, needs_up, _ = ctx.needs_input_grad
        needed = (needs_x, needs_down, needs_up)
        grad_x, grad_down, grad_up = _gradients(grad, x, inner, weight, down, up, ctx.scaling, needed)
        return grad_x, None, None, grad_down, grad_up, None


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., out] y, and [T, r] A x."""
    flat = x.reshape(-1, x.shape[-1])
    inner = flat @ down.T
    y = torch.nn.functional.linear(flat, weight, bias)
    y.addmm_(inner, up.T, alpha=scaling)
    return _shaped_as(y, x), inner


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, A and B; None where not needed."""
    grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_inner = (grad @ up).mul_(scaling)
    grad_x = None
    if needed[0]:
        grad_x = grad @ weight
        grad_x.addmm_(grad_inner, down)
        grad_x = grad_x.view(x.shape)
    grad_down = grad_inner.T @ flat if needed[1] else None
    grad_up = (grad.T @ inner).mul_(scaling) if needed[2] else None
    return grad_x, grad_down, grad_up


def base_products(flat: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """[T, sum of out_i] W_i x + b_i of layers that read x, side by side.

    Args:
        flat: x, [T, in].
        weights: [out_i, in] of each layer, or one matrix that holds those of all.
        biases: [out_i] of each, or empty.
    """
    if len(weights) == 1:
        return torch.nn.functional.linear(flat, weights[0], biases[0] if biases else None)
    widths = [len(weight) for weight in weights]
    y = flat.new_empty(len(flat), sum(widths))
    for index, columns in enumerate(y.split(widths, 1)):
        if biases:
            torch.addmm(biases[index], flat, weights[index].T, out=columns)
        else:
            torch.mm(flat, weights[index].T, out=columns)
    return y


def base_gradient(grad: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """[T, in] gradient of x by the base products.

    Args:
        grad: [T, sum of out_i].
        weights: as in `base_products`.
    """
    first, *others = grad.split([len(weight) for weight in weights], 1)
    grad_x = first @ weights[0]
    for columns, weight in zip(others, weights[1:], strict=True):
        grad_x.addmm_(columns, weight)
    return grad_x


def compiled_lora_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`LoraProduct` for compiled layers: an operator that the compiler does not look into.

    Traced into, the product would be rewritten with a copy of y for each layer.
    """
    y, _ = _product_operator(x, weight, bias, down, up, scaling)
    return y


_product_operator = torch.library.custom_op("trainer::lora_product", _product, mutates_args=())


@_product_operator.register_fake
def _fake_product(
    x: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None, down: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of [..., out] and of [T, r], for the compiler."""
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(math.prod(x.shape[:-1]), down.shape[0])


def joined_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    weights: list[torch.Tensor],
    down: torch.Tensor,
    ups: list[torch.Tensor],
    scalings: list[float],
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of x, which is empty where it is not needed, of the joined A and of each B of layers that read x.

    Args:
        grad: [..., sum of out_i].
        x: [..., in].
        inner: A x, [T, sum of r_i].
        weights: of the base, as in `base_products`.
        down: the joined A, [sum of r_i, in].
        ups: B_i, [out_i, r_i].
        scalings: of each layer.
        needs_x: whether the gradient of x is needed.
    """
    grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_inner, grad_ups = products_for(grad, ups).gradients(grad, inner, ups, scalings)
    grad_x = grad.new_empty(0)
    if needs_x:
        grad_x = base_gradient(grad, weights).addmm_(grad_inner, down).view(x.shape)
    return grad_x, grad_inner.T @ flat, grad_ups


def _gradients_in_operator(
    grad: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x, grad_down, (grad_up,) = joined_gradients(grad, x, inner, [weight], down, [up], [scaling], needs_x)
    return grad_x, grad_down, grad_up


_gradients_operator = torch.library.custom_op("trainer::lora_gradients", _gradients_in_operator, mutates_args=())


@_gradients_operator.register_fake
def _fake_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del inner, weight, scaling
    grad_x = x.new_empty(x.shape) if needs_x else grad.new_empty(0)
    return grad_x, down.new_empty(down.shape), up.new_empty(up.shape)


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, down, up, ctx.scaling = inputs
    ctx.save_for_backward(x, output[1], weight, down, up)


def _operator_backward(ctx: Any, grad: torch.Tensor, _inner: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_down, grad_up = _gradients_operator(grad, *ctx.saved_tensors, ctx.scaling, needs_x)
    return grad_x if needs_x else None, None, None, grad_down, grad_up, None


_product_operator.register_autograd(_operator_backward, setup_context=_save_for_gradients)


class Part(NamedTuple):
    """One adapter's share of a routed product."""

    rows: torch.Tensor
    """[n] positions of its tokens in the pack."""
    scaling: float

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Its rows of [T, ...]: a copy, or all of it, without a copy, where every token is its own.

        Never a view of some rows: products of them could round otherwise, by their place in memory.
        """
        return whole if len(self.rows) == len(whole) else whole[self.rows]

    def put(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Store rows that `of` gave, which were changed in place."""
        if own is not whole:
            whole[self.rows] = own


@final
class RoutedLoraProduct(torch.autograd.Function):
    """`LoraProduct` where each adapter acts on the rows of its own tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: list[Part],
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
            inners.append(part.of(flat) @ down.T)
            part.put(y, part.of(y).addmm_(inners[-1], up.T, alpha=part.scaling))
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
            own = part.of(grad)
            grad_inner = (own @ up).mul_(part.scaling)
            if grad_x is not None:
                part.put(grad_x, part.of(grad_x).addmm_(grad_inner, down))
            needs_down, needs_up = ctx.needs_input_grad[4 + len(grad_pairs) : 6 + len(grad_pairs)]
            grad_pairs.append(grad_inner.T @ part.of(flat) if needs_down else None)
            grad_pairs.append((own.T @ inner).mul_(part.scaling) if needs_up else None)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *grad_pairs
