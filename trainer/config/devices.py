"""Known GPUs, and the training shapes that follow from a GPU's memory by rule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, final

import yaml
from pydantic import NonNegativeFloat, PositiveFloat

from trainer.config.document import dotted, read_document
from trainer.config.section import Section
from trainer.config.shape import ShapeLimit, ShapeLimits, TrainingShape
from trainer.config.validate import validate
from trainer.errors import RecipeError

COUNTS: Final = (1, 2, 4, 8)
"""Devices of one machine for which shapes are made."""
TOKENS_PER_GIB: Final = 256
"""A micro-batch has this many tokens for each GiB, rounded down to a power of two: 16,384 on 79 GiB."""
LONGEST: Final = 4
"""A sequence may have this many times the tokens of a micro-batch: it is then alone in one."""
WEIGHTS_FRAC: Final = 0.7
"""Largest part of all memory that base weights, or the state of full-parameter training, may take."""
LORA_BYTES: Final = 2
"""Bytes per parameter of a frozen base in bfloat16."""
FULL_BYTES: Final = 18
"""Bytes per parameter trained in full: bfloat16 weight, float32 master, gradient and two moments."""
MEMORY_TOLERANCE: Final = 0.05
NAME: Final = re.compile(r"(?P<device>.+)x(?P<count>[1-9][0-9]*)(?P<dp>_dp)?")


@final
class KnownDevice(Section):
    """A GPU that the catalog describes (configs/devices/known.yaml)."""

    device_name: str
    """Name for display, for example `RTX-4090-24G`."""
    match: str
    """Words of the name that the driver gives, for example `RTX 4090`."""
    memory_gib: PositiveFloat
    """Memory that processes can use, in GiB (2**30 bytes); the driver's number is up to 7% higher."""
    bf16_tflops: PositiveFloat
    """Peak of dense bf16 matrix products with float32 accumulation, without sparsity."""
    bandwidth_gbps: PositiveFloat
    """Bandwidth of the memory in GB/s."""
    nvlink_gbps: NonNegativeFloat
    """Bandwidth to other GPUs in GB/s, both directions together; 0 without NVLink."""
    flash_attention: bool = False
    """Whether flash-attn-4 has kernels for it: Hopper and Blackwell of data centers."""
    source: str
    """Where the numbers are published."""

    def is_named(self, name: str, memory_gib: float) -> bool:
        """Whether this is the GPU that a driver calls so.

        Args:
            name: For example NVIDIA GeForce RTX 4090.
            memory_gib: All of its memory, some of which processes cannot use.
        """
        has_words = re.search(rf"\b{re.escape(self.match)}\b", name) is not None
        return has_words and abs(memory_gib / self.memory_gib - 1.02) <= MEMORY_TOLERANCE


def read_devices(directories: Sequence[Path]) -> dict[str, KnownDevice]:
    """Return the catalog by short name, for example `rtx4090`; of two with the same name, the first one found.

    Raises:
        RecipeError: A file has mistakes.
    """
    devices: dict[str, KnownDevice] = {}
    for file in (file for directory in directories for file in sorted(directory.glob("*.yaml"))):
        document = read_document(file)
        for name, fields in document.data.items():
            device, wrong = validate(KnownDevice, fields if isinstance(fields, dict) else {})
            if wrong or device is None:
                path, text = next(iter(wrong.items()))
                raise RecipeError([f"{document.source_of((name, *path))}: {dotted((name, *path))}: {text}"])
            devices.setdefault(name, device)
    return devices


def catalog_shape(name: str, devices: Mapping[str, KnownDevice]) -> TrainingShape | None:
    """Return the shape of known devices with this name, for example `rtx4090x2`; None if there is none.

    Args:
        name: Short name of a device, `x`, their number, and `_dp` if every device holds the whole model.
        devices: The catalog.
    """
    parts = NAME.fullmatch(name)
    if parts is None or parts["device"] not in devices or int(parts["count"]) not in COUNTS:
        return None
    made = made_shapes(parts["device"], devices[parts["device"]].device_name, devices[parts["device"]].memory_gib)
    return next((shape for shape in made if shape.name == name), None)


def made_shapes(
    prefix: str, device_name: str, memory_gib: float, counts: Sequence[int] = COUNTS
) -> Iterator[TrainingShape]:
    """Yield the shapes of equal devices in one machine.

    For each number, first the shape whose devices hold the whole model, then the one that shards it.

    Limits follow from memory alone and are wide; the memory estimate of a recipe decides.

    >>> [shape.name for shape in made_shapes("rtx4090", "RTX-4090-24G", 23.5, (1, 2))]
    ['rtx4090x1', 'rtx4090x2_dp', 'rtx4090x2']

    Args:
        prefix: Name of the shapes, before the number of devices.
        device_name: Name of the device for display.
        memory_gib: What a process can use of each device.
        counts: Numbers of devices.
    """
    for count in counts:
        if count > 1:
            yield _made(f"{prefix}x{count}_dp", device_name, memory_gib, count, shards=1)
        yield _made(f"{prefix}x{count}", device_name, memory_gib, count, shards=count)


def _made(name: str, device_name: str, memory_gib: float, count: int, *, shards: int) -> TrainingShape:
    tokens = 1 << int(memory_gib * TOKENS_PER_GIB).bit_length() - 1
    room = memory_gib * 2**30 * WEIGHTS_FRAC * shards / 1e9
    longest = tokens * LONGEST
    return TrainingShape(
        name=name,
        device="cuda",
        device_name=device_name,
        gpus=count,
        gpu_memory_gib=memory_gib,
        micro_batch_tokens=tokens,
        sharding="full" if shards > 1 else "none",
        limits=ShapeLimits(
            lora=ShapeLimit(max_params_b=round(room / LORA_BYTES, 1), max_seq_tokens=longest, basis="estimated"),
            full=ShapeLimit(max_params_b=round(room / FULL_BYTES, 2), max_seq_tokens=longest // 2, basis="estimated"),
        ),
        accelerate="single" if count == 1 else "several",
    )


def shape_text(shape: TrainingShape) -> str:
    """Return a shape as YAML, to be copied into a file of configs/shapes/."""
    return yaml.safe_dump(shape.model_dump(exclude_none=True), sort_keys=False)
