"""One product for adapted layers that read the same input, such as q, k and v; for compiled layers only.

    [y_1 .. y_n] = [W_1 .. W_n] x + b,  then  y_i += scaling_i * B_i (A_i x),  with [A_1 .. A_n] x in one product

x is read once instead of n times, and its gradient is one sum of products instead of n sums. The weights W_i become
views of one matrix: neither memory nor names change. Parameters of the adapters stay those of each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn

from trainer.model.lora_linear import FusedLinear
from trainer.model.lora_product import fake_product, joined_gradients
from trainer.model.thin_plain import columns_of
from trainer.planning.module_names import JOINED


def group_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scalings: Sequence[float],
) -> tuple[torch.Tensor, ...]:
    """[..., out_i] of each layer: views of one tensor, in compiled layers.

    Args:
        x: [..., in].
        weight: [sum of out_i, in].
        bias: [sum of out_i] or None.
        downs: A_i, [r_i, in] of each layer.
        ups: B_i, [out_i, r_i].
        scalings: of each layer.
    """
    y, _ = _group_operator(x, weight, bias, torch.cat(tuple(downs)), list(ups), list(scalings))
    return y.split([up.shape[0] for up in ups], -1)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    ups: list[torch.Tensor],
    scalings: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., sum of out_i] outputs, and [T, sum of r_i] A x."""
    flat = x.reshape(-1, x.shape[-1])
    inner = flat @ down.T
    y = nn.functional.linear(flat, weight, bias)
    for columns, own, up, scaling in zip(*columns_of(y, inner, ups), ups, scalings, strict=True):
        columns.addmm_(own, up.T, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), inner


_group_operator = torch.library.custom_op("trainer::lora_group", _product, mutates_args=())
_group_operator.register_fake(fake_product)


_group_gradients = torch.library.custom_op("trainer::lora_group_gradients", joined_gradients, mutates_args=())


@_group_gradients.register_fake
def _fake_gradients(*given: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    grad, x, _, _, down, ups, _, needs_x = given
    grad_x = x.new_empty(x.shape) if needs_x else grad.new_empty(0)
    return grad_x, down.new_empty(down.shape), [up.new_empty(up.shape) for up in ups]


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, down, ups, ctx.scalings = inputs
    ctx.save_for_backward(x, output[1], weight, down, *ups)


def _group_backward(ctx: Any, grad: torch.Tensor, _inner: torch.Tensor) -> tuple[Any, ...]:
    x, inner, weight, down, *ups = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_down, grad_ups = _group_gradients(grad, x, inner, weight, down, ups, ctx.scalings, needs_x)
    return grad_x if needs_x else None, None, None, grad_down, grad_ups, None


_group_operator.register_autograd(_group_backward, setup_context=_save_for_gradients)


@final
class ProductGroup:
    """Layers whose products are one: the first that is called computes those of all."""

    def __init__(self, members: Sequence[FusedLinear]) -> None:
        """Join the base weights of the layers.

        Args:
            members: layers that are called with the same input.
        """
        self.members = tuple(members)
        self.weight = torch.cat([member.base_layer.weight.data for member in members])
        """[sum of out_i, in]; the layers' own weights are views of it."""
        biases = [member.base_layer.bias for member in members]
        self.bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        for tensor in (self.weight, self.bias):  # as the compiler takes parameters: their shapes never change
            if tensor is not None:
                torch._dynamo.mark_static(tensor)
        sizes = [member.base_layer.weight.shape[0] for member in members]
        for index, (member, part) in enumerate(zip(members, self.weight.split(sizes), strict=True)):
            member.base_layer.weight.data = part
            member.group, member.group_index = self, index
        self._x: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._num_taken = 0

    def output_of(self, index: int, x: torch.Tensor, name: str) -> torch.Tensor:
        """The output of a layer of the group.

        Args:
            index: of the layer.
            x: its input, [..., in].
            name: of the adapter, which each layer has.
        """
        if self._x is not x:
            self._outputs = group_product(
                x,
                self.weight,
                self.bias,
                [member.lora_A[name].weight for member in self.members],
                [member.lora_B[name].weight for member in self.members],
                [member.scaling[name] for member in self.members],
            )
            self._x, self._num_taken = x, 0
        output = self._outputs[index]
        self._num_taken += 1
        if self._num_taken == len(self.members):
            self._x, self._outputs = None, ()
        return output

    def dissolve(self) -> None:
        """Let each layer compute its own product again; the weights stay views."""
        for member in self.members:
            member.group = None


@final
class GroupSearch:
    """Finds groups in a model: candidates by their names, confirmed by the inputs of a pass."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Watch the candidates.

        Args:
            layers: the decoder layers.
        """
        self._candidates = [found for layer in layers for module in layer.modules() for found in _candidates(module)]
        self._seen: dict[int, list[tuple[Any, ...]]] = {}
        members = [member for candidate in self._candidates for member in candidate]
        self._hooks = [member.register_forward_pre_hook(self._see) for member in members]

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        memory = (x.untyped_storage()._cdata, x.storage_offset())  # fake tensors, as in scripts/lower, have no address
        self._seen.setdefault(id(module), []).append((*memory, tuple(x.shape), x.stride()))

    def cancel(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def finish(self) -> list[ProductGroup]:
        """Stop watching, and join the candidates that were called with the same inputs."""
        self.cancel()
        groups = []
        for candidate in self._candidates:
            inputs = [self._seen.get(id(member)) for member in candidate]
            if inputs[0] is not None and all(each == inputs[0] for each in inputs):
                groups.append(ProductGroup(candidate))
        return groups


def _candidates(module: nn.Module) -> list[list[FusedLinear]]:
    """Groups of layers of a module whose weights can be joined: adapted, all with a bias or all without."""
    found = []
    for names in JOINED:
        members = [getattr(module, name, None) for name in names]
        layers = [member for member in members if isinstance(member, FusedLinear)]
        if len(layers) < len(names):
            continue
        weights = [layer.base_layer.weight for layer in layers]
        kinds = {(weight.shape[1], weight.dtype, weight.device, weight.requires_grad) for weight in weights}
        if len(kinds) == 1 and len({layer.base_layer.bias is None for layer in layers}) == 1:
            found.append(layers)
    return found
