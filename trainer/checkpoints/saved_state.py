"""What a saved state of the training API is on disk, and where a server keeps those that it saved. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.checkpoints.manifest import MANIFEST, FileDigest, Manifest
from trainer.config.recipe import LoraSettings
from trainer.errors import CheckpointError

SCHEME: Final = "tinker://"
"""Begins the path of a state that a server saved: tinker://MODEL/weights/NAME."""
FOLDERS: Final = ("weights", "sampler_weights")
"""Of states to continue from, and of states to sample from; as in the protocol's paths."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of saved states."""
TRAINING_DIR: Final = "runs/.training"
"""Where a server keeps sessions, models and states, unless it is told another place."""
STATE_FILE: Final = "state.json"


@final
@dataclass(frozen=True)
class StateSettings:
    """What state.json says."""

    base: str
    """Digest of the base model."""
    model: str
    """Path of the base model."""
    lora: LoraSettings
    updates: int
    has_optimizer: bool

    @classmethod
    def read(cls, directory: Path) -> StateSettings:
        """Of a state.

        Raises:
            CheckpointError: it is no state, or a damaged one.
        """
        try:
            raw = json.loads((directory / STATE_FILE).read_bytes())
            return cls(
                str(raw["base"]),
                str(raw["model"]),
                LoraSettings.model_validate(raw["lora"]),
                int(raw["updates"]),
                bool(raw["has_optimizer"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: no state of the training API ({type(error).__name__})") from None

    def identity(self) -> str:
        """Hash of what the tensors belong to."""
        return identity_of(self.base, self.lora)


def identity_of(base: str, lora: LoraSettings) -> str:
    """Hash of base and adapter: states with equal hashes have the same tensors.

    Args:
        base: digest of the base model.
        lora: of the adapter.
    """
    document = json.dumps({"kind": "api", "base": base, "lora": lora.model_dump()}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def state_problem(directory: Path) -> str | None:
    """Why a saved state or sampler state cannot be used: a missing or damaged file; None where all is well."""
    try:
        settings = StateSettings.read(directory)
        manifest = Manifest.parse((directory / MANIFEST).read_bytes())
    except (CheckpointError, OSError, ValueError) as error:
        return str(error)
    if manifest.inventory.identity_hash != settings.identity():
        return f"{directory}: {STATE_FILE} was changed"
    for name, digest in manifest.inventory.files.items():
        file = directory / name
        if not file.is_file() or FileDigest.of(file) != digest:
            return f"{file}: missing or damaged"
    return None


def parts_of(path: str) -> tuple[str, str, str]:
    """Model, folder and name of a saved state, from its path in the protocol.

    >>> parts_of("tinker://s1:train:0/weights/step-20")
    ('s1:train:0', 'weights', 'step-20')

    Raises:
        CheckpointError: it is none.
    """
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in FOLDERS or not NAME.fullmatch(parts[2]):
        raise CheckpointError(f"{path}: not tinker://MODEL/{{{','.join(FOLDERS)}}}/NAME")
    return parts[0], parts[1], parts[2]


def directory_of(path: str, root: Path) -> Path:
    """Directory of a saved state.

    Args:
        path: in the protocol.
        root: of the server.

    Raises:
        CheckpointError: the path is none.
    """
    model, folder, name = parts_of(path)
    return root / "models" / model.replace(":", ".") / folder / name


def find_state(target: str) -> Path | None:
    """The directory of a saved state that a command names; None where it names something else.

    Args:
        target: a directory, `tinker://MODEL/weights/NAME` of the server that keeps its states in `TRAINING_DIR`, or
            `DIR#tinker://...` of one that keeps them in DIR.

    Raises:
        CheckpointError: it is a state, and damaged, or there is none of this path.
    """
    root, separator, path = target.partition("#")
    if not separator or not path.startswith(SCHEME):
        root, path = TRAINING_DIR, target
    directory = directory_of(path, Path(root)) if path.startswith(SCHEME) else Path(target)
    if path.startswith(SCHEME) and not directory.is_dir():
        raise CheckpointError(f"{target}: there is no {directory}; with --training-dir DIR write DIR#{path}")
    if not (directory / STATE_FILE).is_file():
        if path.startswith(SCHEME):
            raise CheckpointError(f"{directory}: no state of the training API (it has no {STATE_FILE})")
        return None
    problem = state_problem(directory)
    if problem is not None:
        raise CheckpointError(problem)
    return directory
