"""Keeps the inputs of checkpointed layers in host memory between the forward and the backward pass; for policy.py.

With gradient checkpointing a layer keeps its input only, [T, H]. Each is copied to pinned host memory in the order of
the device's queue, and back when the layer is recomputed: the copies are exact, and cost their transfer time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, final

import torch


@final
class InHostMemory:
    """A tensor that is in host memory, and where it belongs."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Copy it; on a GPU the copy is queued."""
        self._device = tensor.device
        self._kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        self._kept.copy_(tensor, non_blocking=True)

    def back(self) -> torch.Tensor:
        """A copy on the device that it came from."""
        return self._kept.to(self._device, non_blocking=True, copy=True)


@final
class Offload:
    """Moves the inputs of a model's layers to host memory."""

    def __init__(self, width: int) -> None:
        """Take tensors of this width.

        Args:
            width: H, of the hidden states.
        """
        self._width = width
        self.num_moved = 0
        """Tensors that were moved so far."""

    def of_pass(self) -> AbstractContextManager[Any]:
        """The context of a forward pass whose layers are checkpointed."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | InHostMemory:
        if isinstance(tensor, torch.nn.Parameter) or tensor.ndim != 3 or tensor.shape[-1] != self._width:
            return tensor  # weights, positions, statistics of norms
        self.num_moved += 1
        return InHostMemory(tensor)


def _unpack(kept: torch.Tensor | InHostMemory) -> torch.Tensor:
    return kept.back() if isinstance(kept, InHostMemory) else kept
