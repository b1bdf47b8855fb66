"""Atomic and durable file writes: a file is complete or absent, even after a power cut."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file atomically: readers see the old or the new content, never a part.

    Args:
        path: the file.
        content: what it is to hold; text is written as UTF-8.
        durable: whether to fsync, so that the new content survives a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
            if durable:
                file.flush()
                sync(file.fileno(), path)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


def fsync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb") as file:
        sync(file.fileno(), path)


def sync(handle: int, path: Path) -> None:
    """Flush an open file or directory to disk; an error names it, which that of `os.fsync` does not.

    Args:
        handle: of the file.
        path: shown in the error.

    Raises:
        OSError: the disk did not take the data.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Flush a directory to disk, and with it creations and renames of its entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync(handle, path)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably; existing ones are left alone."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_dir(path.parent)


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Fill a temporary directory within the block, then move it to the target; on an error the target is untouched.

    Every file gets the mode that the umask gives to new files: safetensors writes weights that only their owner reads.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        mode = _mode_of_new_files(temporary)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                fsync_file(file)
        fsync_dir(temporary)
        retired = target.with_name(f".{target.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        fsync_dir(target.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _mode_of_new_files(directory: Path) -> int:
    """The mode that the umask gives. Reading the umask itself would change it for other threads for a moment."""
    probe = directory / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode
