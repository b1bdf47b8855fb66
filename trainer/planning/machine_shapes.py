"""The training shapes that the GPUs of this machine make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from trainer.config.devices import COUNTS, KnownDevice, made_shapes
from trainer.config.load import all_shapes, known_devices
from trainer.config.shape import TrainingShape
from trainer.planning.machine import Device

RESERVED_GIB: Final = 0.5
"""Memory of a GPU that processes cannot use."""
BRANDS: Final = re.compile(r"\b(NVIDIA|GeForce|Quadro|Tesla|Laptop GPU)\b")


def machine_shapes(devices: Sequence[Device]) -> list[TrainingShape]:
    """Return the shapes of 1, 2, 4, 8 and all of these GPUs, smallest first; those that have a file as the file says.

    Args:
        devices: The GPUs of the machine; where they differ, all count as the one with least memory.
    """
    return shapes_of(devices, all_shapes(), known_devices())


def shapes_of(
    devices: Sequence[Device], files: Sequence[TrainingShape], known: Mapping[str, KnownDevice]
) -> list[TrainingShape]:
    """Return the shapes of these GPUs.

    Args:
        devices: The GPUs of the machine.
        files: The shapes that have a file.
        known: The catalog of GPUs.
    """
    if not devices:
        return []
    is_mig = any(device.is_mig for device in devices)  # a process uses one instance
    counts = [1] if is_mig else sorted({count for count in (*COUNTS, len(devices)) if count <= len(devices)})
    prefix, device_name, memory_gib = _described(devices, known)
    made = list(made_shapes(prefix, device_name, memory_gib, counts))
    written = [
        shape
        for shape in files
        if shape.device_name == device_name and shape.nodes == 1 and shape.gpus <= counts[-1] and not shape.vllm_gpus
    ]
    by_name = {shape.name: shape for shape in made} | {shape.name: shape for shape in written}
    return sorted(by_name.values(), key=lambda shape: shape.gpus)


def _described(devices: Sequence[Device], known: Mapping[str, KnownDevice]) -> tuple[str, str, float]:
    """Return the prefix of the shapes' names, the name of the device for display, and its memory."""
    for name, device in known.items():
        if all(device.is_named(each.name, each.memory_gib) for each in devices):
            return name, device.device_name, device.memory_gib
    memory_gib = min(int(2 * (each.memory_gib - RESERVED_GIB)) / 2 for each in devices)
    names = sorted({" ".join(BRANDS.sub("", each.name).split()) for each in devices})
    prefix = re.sub(r"[^a-z0-9]", "", names[0].lower()) if len(names) == 1 else "mixed"
    return prefix, " and ".join(names), max(memory_gib, RESERVED_GIB)
