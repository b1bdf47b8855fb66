"""A checkpoint of one process as one directory: DCP tensors, a manifest with digests, and files beside them.

For states that no run directory holds: those of the training API. The format is that of a run's checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.checkpoints.manifest import MANIFEST, FileDigest, Inventory, Manifest, verified_manifest
from trainer.checkpoints.reader import SafeReader
from trainer.errors import CheckpointError
from trainer.files import write_atomically


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors in DCP's format.

    Args:
        directory: an existing one.
        tensors: by name.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns when there is a single process
            state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(directory), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{directory}: not written: {_cause(error)}") from error


def write_manifest(directory: Path, step: int, identity: str, counters: Mapping[str, float]) -> None:
    """Write the manifest over all files of a directory, last.

    Args:
        directory: complete but for the manifest.
        step: number of the state.
        identity: hash of what the state belongs to.
        counters: scalars of the state.
    """
    files = {file.name: FileDigest.of(file) for file in sorted(directory.iterdir()) if file.name != MANIFEST}
    write_atomically(directory / MANIFEST, Manifest(Inventory(step, identity, files), counters, 1).dump())


def read_tensors(directory: Path, identity: str, tensors: Mapping[str, torch.Tensor], *, all_of_it: bool) -> Manifest:
    """Verify a state and read it into tensors.

    Args:
        directory: the state.
        identity: hash of what it must belong to.
        tensors: are overwritten.
        all_of_it: whether the state may have no other tensors.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: a file is missing or damaged, or the state belongs to something else.
    """
    manifest = verified_manifest(directory, identity)
    try:
        entries = SafeReader(directory).read_metadata().state_dict_metadata
        sizes = {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        wanted = {name: tensor.size() for name, tensor in tensors.items()}
        if (sizes if all_of_it else {name: size for name, size in sizes.items() if name in wanted}) != wanted:
            raise CheckpointError(f"{directory}: its tensors are not those of this model and adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state_dict_loader.load(dict(tensors), storage_reader=SafeReader(directory), no_dist=True)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{directory}: cannot be read: {_cause(error)}") from error
    return manifest


def _cause(error: BaseException) -> str:
    """First line of the innermost error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__
