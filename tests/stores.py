"""A store of accounts for a test: a copy of one that was migrated once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from trainer.control.store import Store


@functools.cache
def _template() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        Store(f"sqlite:///{directory}/store.sqlite").open()
        return (Path(directory) / "store.sqlite").read_bytes()


def migrated(directory: Path) -> Store:
    """A store in a directory, without accounts."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = directory / "store.sqlite"
    file.touch(mode=0o600)
    file.write_bytes(_template())
    return Store(f"sqlite:///{file}")
