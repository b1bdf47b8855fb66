"""Copies from host memory to a device; on a GPU the host does not wait for them. For packs and their layouts."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device.

    A copy from pageable memory waits until the GPU has finished everything queued before it. From pinned memory it is
    queued like a kernel, and torch keeps the memory until the copy has run.

    Args:
        tensor: in host memory.
        device: where it goes; on a CPU the tensor is returned as it is.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
