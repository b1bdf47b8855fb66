"""What the gateway reads of an adapter's files without torch: a digest, and whether all weights are finite."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

import numpy as np

from trainer.errors import ModelError

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
EXPONENTS: Final = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}
"""By dtype: how to read a number's bits, and those that are all set where it is infinite or no number."""
DIGEST_LENGTH: Final = 12


def adapter_digest(directory: Path) -> str:
    """First hexadecimal digits of the SHA-256 of an adapter's configuration and weights.

    Raises:
        ModelError: the files cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for name in (CONFIG, WEIGHTS):
            with (directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ModelError(f"{error.filename}: {error.strerror}") from None
    return digest.hexdigest()[:DIGEST_LENGTH]


def refuse_not_finite(directory: Path) -> None:
    """Refuse an adapter with values that are not finite, which would break every answer.

    Raises:
        ModelError: it has some, with the tensor's name, or its file cannot be read.
    """
    file = directory / WEIGHTS
    try:
        data = np.memmap(file, dtype=np.uint8, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + size].tobytes())
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in EXPONENTS:
                continue
            kind, mask = EXPONENTS[entry["dtype"]]
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(data[begin:end].tobytes(), dtype=kind)
            if bool(((bits & mask) == mask).any()):
                raise ModelError(f"{file}: {name} has values that are not finite")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None
