"""One product for adapted layers that read the same input, such as q, k and v; for compiled layers only.

    [y_1 .. y_n] = [W_1 .. W_n] x + b,  then  y_i += scaling_i * B_i (A_i x),  with [A_1 .. A_n] x in one product

x is read once by A, and its gradient is one sum of products instead of n sums. The weights W_i become views of one
matrix, whose product reads x once: neither memory nor names change. Weights that are sharded over ranks (FSDP) cannot
be views: each layer's own is gathered, and its product is written into its columns of y. Parameters of the adapters
stay those of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn

from trainer.distributed.sharding import is_sharded
from trainer.model.lora_linear import FusedLinear
from trainer.model.lora_product import base_products, joined_gradients
from trainer.model.thin_plain import columns_of
from trainer.planning.module_names import JOINED


def group_product(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scalings: Sequence[float],
) -> tuple[torch.Tensor, ...]:
    """[..., out_i] of each layer: views of one tensor, in compiled layers.

    Args:
        x: [..., in].
        weights: [out_i, in] of each layer, or one matrix that holds those of all.
        biases: [out_i] of each, or one vector, or empty.
        downs: A_i, [r_i, in] of each layer.
        ups: B_i, [out_i, r_i].
        scalings: of each layer.
    """
    y, _ = _group_operator(x, list(weights), list(biases), torch.cat(tuple(downs)), list(ups), list(scalings))
    return y.split([up.shape[0] for up in ups], -1)


def _product(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    down: torch.Tensor,
    ups: list[torch.Tensor],
    scalings: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., sum of out_i] outputs, and [T, sum of r_i] A x."""
    flat = x.reshape(-1, x.shape[-1])
    inner = flat @ down.T
    y = base_products(flat, weights, biases)
    for columns, own, up, scaling in zip(*columns_of(y, inner, ups), ups, scalings, strict=True):
        columns.addmm_(own, up.T, alpha=scaling)
    return y.view(*x.shape[:-1], y.shape[1]), inner


_group_operator = torch.library.custom_op("trainer::lora_group", _product, mutates_args=())


@_group_operator.register_fake
def _fake_product(
    x: torch.Tensor, weights: list[torch.Tensor], _biases: list[torch.Tensor], down: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    width = sum(weight.shape[0] for weight in weights)
    return x.new_empty(*x.shape[:-1], width), x.new_empty(math.prod(x.shape[:-1]), down.shape[0])


_group_gradients = torch.library.custom_op("trainer::lora_group_gradients", joined_gradients, mutates_args=())


@_group_gradients.register_fake
def _fake_gradients(*given: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    grad, x, _, _, down, ups, _, needs_x = given
    grad_x = x.new_empty(x.shape) if needs_x else grad.new_empty(0)
    return grad_x, down.new_empty(down.shape), [up.new_empty(up.shape) for up in ups]


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weights, biases, down, ups, ctx.scalings = inputs
    ctx.num_weights, ctx.num_biases = len(weights), len(biases)
    ctx.save_for_backward(x, output[1], down, *weights, *ups)


def _group_backward(ctx: Any, grad: torch.Tensor, _inner: torch.Tensor) -> tuple[Any, ...]:
    x, inner, down, *rest = ctx.saved_tensors
    weights, ups, needs_x = rest[: ctx.num_weights], rest[ctx.num_weights :], ctx.needs_input_grad[0]
    grad_x, grad_down, grad_ups = _group_gradients(grad, x, inner, weights, down, ups, ctx.scalings, needs_x)
    frozen = [None] * ctx.num_weights, [None] * ctx.num_biases
    return grad_x if needs_x else None, *frozen, grad_down, grad_ups, None


_group_operator.register_autograd(_group_backward, setup_context=_save_for_gradients)


@final
class ProductGroup:
    """Layers whose products are one: the first that is called computes those of all."""

    def __init__(self, members: Sequence[FusedLinear]) -> None:
        """Join the base weights of the layers, unless ranks share them.

        Args:
            members: layers that are called with the same input.
        """
        self.members = tuple(members)
        self.weight: torch.Tensor | None = None
        """[sum of out_i, in]; the layers' own weights are views of it. None: each layer's own is used."""
        self.bias: torch.Tensor | None = None
        if not any(is_sharded(member.base_layer.weight) for member in members):
            self._join()
        for index, member in enumerate(members):
            member.group, member.group_index = self, index
        self._x: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._num_taken = 0

    def _join(self) -> None:
        bases = [member.base_layer for member in self.members]
        self.weight = torch.cat([base.weight.data for base in bases])
        if bases[0].bias is not None:
            self.bias = torch.cat([base.bias.data for base in bases])
        for tensor in (self.weight, self.bias):  # as the compiler takes parameters: their shapes never change
            if tensor is not None:
                torch._dynamo.mark_static(tensor)
        for base, part in zip(bases, self.weight.split([len(base.weight) for base in bases]), strict=True):
            base.weight.data = part

    def __deepcopy__(self, _memo: dict[int, Any]) -> ProductGroup:
        """A copied model, such as a decoder's, is never compiled: it needs no joined weights of its own."""
        return self

    @property
    def weights(self) -> list[torch.Tensor]:
        """Base weights as `group_product` takes them; in a sharded policy those that are gathered at present."""
        return [self.weight] if self.weight is not None else [member.base_layer.weight for member in self.members]

    @property
    def biases(self) -> list[torch.Tensor]:
        """Their biases; empty: the layers have none."""
        if self.weight is not None:
            return [] if self.bias is None else [self.bias]
        return [member.base_layer.bias for member in self.members if member.base_layer.bias is not None]

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
                self.weights,
                self.biases,
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
