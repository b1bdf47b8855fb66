"""A gated layer, down(silu(gate(x)) * up(x)), with its three adapters as one operator; for compiled layers only.

    gate = W_gate x + s_gate * B_gate (A_gate x),  up likewise,  h = silu(gate) * up
    y = W_down h + s_down * B_down (A_down h)

Only the base products of gate and up are kept, [T, 2 * width], and A x of the adapters: h is computed again from them.
The base weights of gate and up are one matrix or two (lora_group.py).
On a GPU the adapters' products with gate, up and h are computed where these are in registers (swiglu_kernels.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, final

import torch
from torch import nn

from trainer.model.lora_group import ProductGroup
from trainer.model.lora_linear import FusedLinear
from trainer.model.lora_product import base_gradient, base_products
from trainer.model.thin_choice import has_kernels, products_for
from trainer.planning.module_names import GATED


def _forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    down: torch.Tensor,
    ups: list[torch.Tensor],
    last_weight: torch.Tensor,
    last_down: torch.Tensor,
    last_up: torch.Tensor,
    scalings: list[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., out] y; what the backward pass needs: gate and up without adapters, A x of both, and A_down h."""
    flat = x.reshape(-1, x.shape[-1])
    inner = flat @ down.T
    both = base_products(flat, weights, [])
    products = products_for(both, [*ups, last_up])
    hidden, last_inner = products.swiglu(both, inner, (ups[0], ups[1]), last_down, (scalings[0], scalings[1]))
    y = (hidden @ last_weight.T).addmm_(last_inner, last_up.T, alpha=scalings[2])
    return y.view(*x.shape[:-1], -1), both, inner, last_inner


def _backward(  # noqa: PLR0913 - an operator takes tensors and lists only
    grad: torch.Tensor,
    x: torch.Tensor,
    both: torch.Tensor,
    inner: torch.Tensor,
    last_inner: torch.Tensor,
    weights: list[torch.Tensor],
    down: torch.Tensor,
    ups: list[torch.Tensor],
    last_weight: torch.Tensor,
    last_down: torch.Tensor,
    last_up: torch.Tensor,
    scalings: list[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the joined A, of B_gate and B_up, and of A_down and B_down."""
    grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    products = products_for(both, [*ups, last_up])
    grad_last_inner, (grad_last_up,) = products.gradients(grad, last_inner, [last_up], scalings[2:])
    grad_both, grad_inner, grad_gate, grad_up, grad_last_down = products.swiglu_gradients(
        grad @ last_weight, both, inner, grad_last_inner, (ups[0], ups[1]), last_down, (scalings[0], scalings[1])
    )
    grad_x = base_gradient(grad_both, weights).addmm_(grad_inner, down).view(x.shape)
    return grad_x, grad_inner.T @ flat, grad_gate, grad_up, grad_last_down, grad_last_up


_operator = torch.library.custom_op("trainer::lora_mlp", _forward, mutates_args=())
_gradients = torch.library.custom_op("trainer::lora_mlp_gradients", _backward, mutates_args=())


@_operator.register_fake
def _fake(*given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weights, down, _, last_weight, last_down, *_ = given
    rows = x.numel() // x.shape[-1]
    sizes = (rows, sum(map(len, weights))), (rows, len(down)), (rows, len(last_down))
    y = x.new_empty(*x.shape[:-1], len(last_weight))
    both, inner, last_inner = (x.new_empty(size) for size in sizes)
    return y, both, inner, last_inner


@_gradients.register_fake
def _fake_gradients(*given: Any) -> tuple[torch.Tensor, ...]:
    _, x, _, _, _, _, down, ups, _, last_down, last_up, _ = given
    return tuple(each.new_empty(each.shape) for each in (x, down, *ups, last_down, last_up))


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weights, down, ups, last_weight, last_down, last_up, ctx.scalings = inputs
    ctx.save_for_backward(x, *output[1:], *weights, down, *ups, last_weight, last_down, last_up)


def _operator_backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    x, both, inner, last_inner, *weights, down, gate, up, last_weight, last_down, last_up = ctx.saved_tensors
    grad_x, grad_down, *grad_ups, grad_last_down, grad_last_up = _gradients(
        grad, x, both, inner, last_inner, weights, down, [gate, up], last_weight, last_down, last_up, ctx.scalings
    )
    return grad_x, [None] * len(weights), grad_down, grad_ups, None, grad_last_down, grad_last_up, None


_operator.register_autograd(_operator_backward, setup_context=_save_for_gradients)


@final
class GatedLayer:
    """The joined products of gate and up, and the layer that reads silu(gate) * up."""

    def __init__(self, module: nn.Module, group: ProductGroup, last: FusedLinear) -> None:
        """Let the module use one operator in compiled layers.

        Args:
            module: whose forward is down(silu(gate(x)) * up(x)).
            group: gate and up, without biases.
            last: down, without a bias.
        """
        self.group, self.last = group, last
        self._module, self._original = module, module.forward
        module.forward = MethodType(_gated_forward, self)

    def output_of(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return y of an adapter that all three layers have.

        Args:
            x: [..., in].
            name: of the adapter.
        """
        members = self.group.members
        layers = (*members, self.last)
        y, *_ = _operator(
            x,
            self.group.weights,
            torch.cat([member.lora_A[name].weight for member in members]),
            [member.lora_B[name].weight for member in members],
            self.last.base_layer.weight,
            self.last.lora_A[name].weight,
            self.last.lora_B[name].weight,
            [layer.scaling[name] for layer in layers],
        )
        return y

    def dissolve(self) -> None:
        """Give the module its own forward back."""
        del self._module.forward


def _gated_forward(gated: GatedLayer, x: torch.Tensor) -> torch.Tensor:
    name = gated.last.plain_adapter() if torch.compiler.is_compiling() else None
    if name is None or any(member.plain_adapter() != name for member in gated.group.members):
        return gated._original(x)
    return gated.output_of(x, name)


def find_gated(layers: Sequence[nn.Module], groups: Sequence[ProductGroup]) -> list[GatedLayer]:
    """The gated layers among decoder layers, whose gate and up are a group; they use one operator from now on.

    Args:
        layers: the decoder layers.
        groups: found in them.
    """
    group_of = {group.members: group for group in groups}
    found = []
    for module in (module for layer in layers for module in layer.modules()):
        gate, up, last = (getattr(module, name, None) for name in GATED)
        group = group_of.get((gate, up))  # type: ignore[arg-type]
        if group is None or group.biases or not isinstance(last, FusedLinear):
            continue
        if last.base_layer.bias is None and is_swiglu(module) and _has_kernels((*group.members, last)):
            found.append(GatedLayer(module, group, last))
    return found


def _has_kernels(layers: Sequence[FusedLinear]) -> bool:
    """Whether the kernels apply: without them, the compiler's own kernel of silu is faster than this operator."""
    name = layers[-1].plain_adapter()
    if name is None or any(name not in layer.lora_B for layer in layers):
        return False
    return has_kernels(layers[-1].base_layer.weight, [layer.lora_B[name].weight for layer in layers])


@final
class _Term:
    """An expression instead of a tensor."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __mul__(self, other: _Term) -> _Term:
        return _Term(f"{self.text} * {other.text}")


@final
class _Spelled:
    """A module whose layers write what they compute."""

    def __getattr__(self, name: str) -> Any:
        return lambda term: _Term(f"{name}({term.text})")


def is_swiglu(module: nn.Module) -> bool:
    """Whether the forward of a module's class is down_proj(silu(gate_proj(x)) * up_proj(x)), and nothing else.

    Its code is run with expressions instead of tensors.

    Args:
        module: with `act_fn`.
    """
    act_fn = getattr(module, "act_fn", None)
    if not isinstance(act_fn, nn.Module) or type(act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    try:
        found = type(module).forward(_Spelled(), _Term("x"))
    except (TypeError, AttributeError, IndexError, ValueError):  # it does something else with x
        return False
    return isinstance(found, _Term) and found.text == "down_proj(act_fn(gate_proj(x)) * up_proj(x))"
