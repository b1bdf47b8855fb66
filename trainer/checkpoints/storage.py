"""A directory on any storage that fsspec knows; what fails for a moment is tried again. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, final

from fsspec.core import url_to_fs

from trainer.errors import MirrorAccessError, MirrorError, UserError

T = TypeVar("T")

TRIES: Final = 4
PACKAGES: Final = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "oss": "ossfs",
    "smb": "smbprotocol",
    "webdav": "webdav4",
}
"""What fsspec needs beside itself."""
ACCESS_ERRORS: Final = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
"""Not PermissionError, and of packages that may be missing: known by name."""


@final
class Storage:
    """Files under an address, named relative to it.

    Every method may raise MirrorError, where the storage keeps failing, and MirrorAccessError, where it refuses.
    """

    def __init__(self, address: str, backoff_s: float) -> None:
        """Find the storage; nothing is read or written yet.

        Args:
            address: of fsspec, such as `s3://bucket/prefix`.
            backoff_s: seconds before an operation that failed is tried again; doubled each time.

        Raises:
            UserError: fsspec does not know the address, or a package is missing.
        """
        self.address, self.backoff_s = address, backoff_s
        self._fs, root = _file_system(address)
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """Names of the entries at the top; empty where there is nothing."""
        self._fs.invalidate_cache()
        try:
            found = self._tried(partial(self._fs.ls, self._root, detail=False))
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]

    def sizes(self, directory: str) -> dict[str, int]:
        """Bytes of each file under a directory, by its path there; empty where there is no such directory."""
        root = f"{self._root}/{directory}"
        self._fs.invalidate_cache()
        try:
            return {path.removeprefix(f"{root}/"): size for path, size in self._files(root)}
        except FileNotFoundError:
            return {}

    def _files(self, directory: str) -> Iterator[tuple[str, int]]:
        """As fsspec's `find`, which leaves out what fails for a moment."""
        for entry in self._tried(partial(self._fs.ls, directory, detail=True)):
            path = str(entry["name"]).rstrip("/")
            if entry["type"] != "directory":
                yield path, int(entry["size"])
            elif path != directory:
                yield from self._files(path)

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return bytes(self._tried(partial(self._fs.cat_file, f"{self._root}/{name}")))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._tried(partial(self._fs.pipe_file, f"{self._root}/{name}", data))

    def upload(self, local: Path, name: str) -> None:
        """Copy a local file there.

        Raises:
            FileNotFoundError: the local file, or the bucket, does not exist.
        """
        self._tried(partial(self._fs.put_file, str(local), f"{self._root}/{name}"))

    def download(self, name: str, local: Path) -> None:
        """Copy a file here.

        Raises:
            FileNotFoundError: there is no such file.
        """
        self._tried(partial(self._fs.get_file, f"{self._root}/{name}", str(local)))

    def remove(self, name: str, *, recursive: bool = False) -> None:
        """Delete a file or a directory; it may be gone already."""
        self._fs.invalidate_cache()
        try:
            self._tried(partial(self._fs.rm, f"{self._root}/{name}", recursive=recursive))
        except FileNotFoundError:
            return

    def _tried(self, operation: Callable[[], T]) -> T:
        for number in range(TRIES):
            try:
                return operation()
            except FileNotFoundError:
                raise  # callers have an answer
            except Exception as error:  # each storage has kinds of its own
                if isinstance(error, PermissionError) or type(error).__name__ in ACCESS_ERRORS:
                    remedy = "Check the credentials in the environment and their rights (docs/mirror.md)"
                    raise MirrorAccessError(f"{self.address}: access refused: {first_line(error)}. {remedy}") from error
                if number == TRIES - 1:
                    raise MirrorError(f"{self.address}: {first_line(error)} (tried {TRIES} times)") from error
                time.sleep(self.backoff_s * 2**number)
        raise AssertionError("the last try returns or raises")


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    protocol = address.split("://")[0]
    options = {"auto_mkdir": True} if protocol in {"file", "local"} else {}
    try:
        file_system, root = url_to_fs(address, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"Run: pip install {package}" if package else str(error)
        raise UserError(f"checkpoint.mirror: {address}: the package for {protocol}:// is missing. {remedy}") from None
    except ValueError as error:
        raise UserError(f"checkpoint.mirror: {address}: {error}") from None
    return file_system, str(root)
