"""Reads torch DCP checkpoints without executing code from their pickles."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from trainer.errors import CheckpointError


class _RestrictedUnpickler(pickle.Unpickler):
    """Loads only DCP's metadata records of tensors and torch's value types."""

    ALLOWED: Final = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                    "StorageMeta", "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        if module in {"pathlib", "pathlib._local"} and name in {"PosixPath", "PurePosixPath", "Path"}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class SafeReader(FileSystemReader):
    """DCP's file reader with the restricted unpickler."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Load DCP's metadata of the tensors.

        Raises:
            CheckpointError: the pickle contains anything else.
        """
        data = (Path(self.path) / ".metadata").read_bytes()
        try:
            metadata = _RestrictedUnpickler(io.BytesIO(data)).load()
        except Exception as error:  # a crafted pickle can raise any error
            raise CheckpointError(f"{self.path}/.metadata: refused: {error}") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{self.path}/.metadata: holds {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
