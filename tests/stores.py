"""A store of accounts for a test: a copy of one that was migrated once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from trainer.control.accounts import create_account
from trainer.control.audit import Actor
from trainer.control.store import Store

ACTOR = Actor("cli test")


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


def with_team(directory: Path) -> Store:
    """A store in a directory, with the account `team`."""
    store = migrated(directory)
    create_account(store, ACTOR, "team")
    return store
