"""FSDP2 (torch `fully_shard`): parameters split over ranks; the only module that knows sharded tensors.

Frozen bases are gathered layer by layer for each pass, in the compute dtype. With full parameters the shards are the
float32 masters themselves, cast to the compute dtype as they are gathered. Gradients are summed over ranks, never
averaged: the learner divides by the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree


def shard_module(
    root: nn.Module,
    layer_names: Iterable[str],
    mesh: DeviceMesh,
    *,
    ignored: set[nn.Parameter],
    compute_dtype: torch.dtype,
) -> None:
    """Split a module's parameters over the ranks, layer by layer; every rank calls it with equal values.

    Args:
        root: the module that alone is called from outside.
        layer_names: class names of the layers that are gathered one at a time.
        mesh: the ranks.
        ignored: parameters that stay whole on every rank.
        compute_dtype: of the gathered parameters.
    """
    wanted = set(layer_names)
    layers = [module for module in root.modules() if type(module).__name__ in wanted]
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in (*layers, root):
        trained = [
            parameter for parameter in module.parameters() if parameter.requires_grad and parameter not in ignored
        ]
        with torch.no_grad():
            for parameter in trained:
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()  # the shard is its own master
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=ignored, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other, and a factor alone raises there


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a part of it only."""
    return isinstance(tensor, DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of this rank, of the same storage; a whole tensor is its own part."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def placed_like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A rank's part as a tensor that is split like another; whole where the other is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def copied_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, split like the tensor."""
    return placed_like(local_of(tensor.detach()).to("cpu", copy=True), tensor)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor from all its parts; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def exchange(parameters: Mapping[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Swap the parameters' values with others; of sharded ones, this rank's parts.

    Args:
        parameters: by name.
        values: by the same names; holds the parameters' values afterwards.
    """
    for name, parameter in parameters.items():
        if is_sharded(parameter):  # FSDP gathers from this storage, so the contents move
            part = local_of(parameter.detach())
            before = part.clone()
            part.copy_(values[name])
            values[name].copy_(before)
        else:
            parameter.data, values[name] = values[name], parameter.data


@contextmanager
def root_gathered(root: nn.Module) -> Iterator[None]:
    """Within the block the root's own parameters are whole, so that a submodule can be called; every rank enters it."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def register_output(kind: type, field_names: list[str]) -> None:
    """Let FSDP see the tensors of a dataclass that a sharded module returns; it hooks their gradients."""
    _pytree.register_dataclass(kind, field_names=field_names, drop_field_names=[])
