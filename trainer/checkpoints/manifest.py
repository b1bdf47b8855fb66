"""The files of a checkpoint with their sizes and digests: manifest.json, and complete.json on a mirror. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.errors import CheckpointError
from trainer.files import file_sha256

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
"""In a checkpoint directory; written last."""


@final
@dataclass(frozen=True)
class FileDigest:
    """Size and SHA-256 of one file, for example 1048 bytes and "9f86d0..."."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileDigest:
        """Measure a file."""
        return cls(file.stat().st_size, file_sha256(file))


@final
@dataclass(frozen=True)
class Inventory:
    """A step's files, for example step 20 with {"__0_0.distcp": FileDigest(1048, "9f86d0...")}."""

    step: int
    identity_hash: str
    """Of the run that the checkpoint belongs to."""
    files: Mapping[str, FileDigest]
    """By path relative to the directory of the step."""

    @classmethod
    def parse(cls, text: str | bytes) -> Inventory:
        """Read JSON.

        Raises:
            ValueError: it is not an inventory; the message names the kind of error.
        """
        return _inventory(_loaded(text))

    def dump(self) -> str:
        """Write JSON."""
        document = {
            "format": FORMAT,
            "step": self.step,
            "identity_hash": self.identity_hash,
            "files": _entries(self.files),
        }
        return json.dumps(document, indent=1)


@final
@dataclass(frozen=True)
class Manifest:
    """What manifest.json says: the files of a checkpoint, and the scalars of the training state."""

    inventory: Inventory
    counters: Mapping[str, float]
    """For example {"updates": 40}: 20 steps of two optimizer updates each."""
    world_size: int
    """Number of ranks that saved it; it loads on any number."""

    @classmethod
    def parse(cls, text: str | bytes) -> Manifest:
        """Read JSON.

        Raises:
            ValueError: it is not a manifest; the message names the kind of error.
        """
        document = _loaded(text)
        inventory = _inventory(document)
        try:
            return cls(inventory, dict(document["counters"]), int(document["world_size"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(type(error).__name__) from None

    def dump(self) -> str:
        """Write JSON."""
        document = {
            "format": FORMAT,
            "step": self.inventory.step,
            "counters": dict(self.counters),
            "world_size": self.world_size,
            "identity_hash": self.inventory.identity_hash,
            "files": _entries(self.inventory.files),
        }
        return json.dumps(document, indent=1)


def verified_manifest(directory: Path, identity_hash: str) -> Manifest:
    """The manifest of a checkpoint whose files are all there and undamaged.

    Args:
        directory: the checkpoint.
        identity_hash: of the run that it must belong to.

    Raises:
        CheckpointError: it belongs to another run, or a file is missing or damaged.
    """
    try:
        manifest = Manifest.parse((directory / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: no readable manifest ({error})") from None
    files = manifest.inventory.files
    if manifest.inventory.identity_hash != identity_hash:
        raise CheckpointError(f"{directory}: belongs to another run")
    if ".metadata" not in files:
        raise CheckpointError(f"{directory}: lists no metadata")
    for name, digest in files.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != digest.num_bytes or FileDigest.of(file) != digest:
            raise CheckpointError(f"{file}: damaged")
    return manifest


def _entries(files: Mapping[str, FileDigest]) -> dict[str, dict[str, int | str]]:
    return {name: {"bytes": digest.num_bytes, "sha256": digest.sha256} for name, digest in files.items()}


def _loaded(text: str | bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(type(error).__name__) from None
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__}")
    return document


def _inventory(document: Mapping[str, Any]) -> Inventory:
    try:
        files = {
            str(name): FileDigest(int(entry["bytes"]), entry["sha256"]) for name, entry in document["files"].items()
        }
        return Inventory(int(document["step"]), str(document["identity_hash"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(type(error).__name__) from None
