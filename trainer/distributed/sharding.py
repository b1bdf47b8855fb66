"""Parameters split over ranks with FSDP2 (torch `fully_shard`).

A frozen base is gathered layer by layer for each pass, in the compute dtype; what is in no layer, such as embedding and
head, stays whole, because it would be gathered for as long as a pass takes. With full parameters everything is split,
and the shards are the float32 masters; they are cast to the compute dtype when gathered. Gradients are summed over
ranks, not averaged: the learner divides by the denominator of the whole step. No other module uses `DTensor`
(tests/unit/test_boundaries.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

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
        root: the module whose forward is called.
        layer_names: class names of the layers, which are gathered one at a time.
        mesh: the ranks.
        ignored: parameters that stay whole on every rank.
        compute_dtype: of the gathered parameters.
    """
    layers = layers_of(root, layer_names)
    # Inputs stay as they are: FSDP's cast copies dataclasses, with the caches that layers fill (layout.py).
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*layers, root):
        trained = [
            parameter for parameter in module.parameters() if parameter.requires_grad and parameter not in ignored
        ]
        with torch.no_grad():
            for parameter in trained:
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()  # the shard is the float32 master
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=ignored, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports only SUM, and raises on a factor without it


def outside_layers(root: nn.Module, layer_names: Iterable[str]) -> set[nn.Parameter]:
    """The parameters that are in no layer; none if there are no layers.

    Args:
        root: a module.
        layer_names: class names of its layers.
    """
    layers = layers_of(root, layer_names)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    return {parameter for parameter in root.parameters() if parameter not in inside} if layers else set()


def layers_of(root: nn.Module, layer_names: Iterable[str]) -> list[nn.Module]:
    """The modules of these classes.

    Args:
        root: a module.
        layer_names: class names.
    """
    names = set(layer_names)
    return [module for module in root.modules() if type(module).__name__ in names]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of this rank, sharing storage; an unsharded tensor is returned as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def placed_like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Wrap a rank's part as a tensor that is sharded like another one.

    Args:
        local: this rank's part.
        tensor: gives mesh, placements and shape; if it is unsharded, `local` is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def copied_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, sharded like the tensor.

    Its mesh is one of CPUs: `DTensor.from_local` moves a part to the device of the mesh.
    """
    part = local_of(tensor.detach()).to("cpu", copy=True)
    if not isinstance(tensor, DTensor):
        return part
    mesh = tensor.device_mesh if tensor.device_mesh.device_type == "cpu" else _cpu_mesh(tensor.device_mesh)
    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@cache
def _cpu_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks as a mesh of CPUs; it communicates through the groups of the mesh, which have gloo for CPUs."""
    groups = mesh.get_all_groups()
    names = mesh.mesh_dim_names
    return DeviceMesh.from_group(
        groups[0] if len(groups) == 1 else groups,
        "cpu",
        mesh=None if len(groups) == 1 else mesh.mesh,
        mesh_dim_names=names,
    )


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered from all ranks; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def exchange(parameters: Mapping[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Swap parameter values with others; for sharded parameters, this rank's parts.

    Args:
        parameters: by name.
        values: by the same names; afterwards it holds the previous values of the parameters.
    """
    for name, parameter in parameters.items():
        if is_sharded(parameter):  # FSDP gathers from this storage, so contents are exchanged, not storages
            part = local_of(parameter.detach())
            before = part.clone()
            part.copy_(values[name])
            values[name].copy_(before)
        else:
            parameter.data, values[name] = values[name], parameter.data


@contextmanager
def root_gathered(root: nn.Module) -> Iterator[None]:
    """Gather the root's own parameters within the block, to call a submodule directly; every rank enters it."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def register_output(kind: type, field_names: list[str]) -> None:
    """Register a dataclass that a sharded module returns, so that FSDP finds its tensors and hooks their gradients."""
    if kind not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(kind, field_names=field_names, drop_field_names=[])
