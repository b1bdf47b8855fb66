"""Reads and writes files on any storage that fsspec supports, with retries. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, final

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from trainer.errors import MirrorAccessError, MirrorError, UserError
from trainer.retry import retry

T = TypeVar("T")

TRIES: Final = 4
"""Calls of an operation that keeps failing."""
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
"""The package that fsspec needs for a protocol."""
ACCESS_ERRORS: Final = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
"""Refusals that are no PermissionError. By name, since their packages may not be installed."""


@final
class Storage:
    """Files under an address, by their path relative to it.

    Every method raises MirrorError if the storage keeps failing, and MirrorAccessError if it refuses access.
    """

    def __init__(self, address: str, backoff_s: float) -> None:
        """Find the file system; nothing is read or written yet.

        Args:
            address: an fsspec address, such as `s3://bucket/prefix`.
            backoff_s: seconds before a failed operation is retried; doubled each time.

        Raises:
            UserError: fsspec does not know the address, or a package is missing.
        """
        self.address = address
        self._pauses_s = tuple(backoff_s * 2**number for number in range(TRIES - 1))
        self._fs, root = _file_system(address)
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """Names of the files and directories at the address; empty if it does not exist."""
        self._fs.invalidate_cache()
        try:
            paths = self._retried(partial(self._fs.ls, self._root, detail=False))
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def sizes(self, directory: str) -> dict[str, int]:
        """Size in bytes of each file under a directory, by relative path; empty if there is no such directory."""
        root = f"{self._root}/{directory}"
        self._fs.invalidate_cache()
        try:
            return {path.removeprefix(f"{root}/"): size for path, size in self._files(root)}
        except FileNotFoundError:
            return {}

    def _files(self, directory: str) -> Iterator[tuple[str, int]]:
        """Like fsspec's `find`, which would leave out directories whose listing fails temporarily."""
        for entry in self._retried(partial(self._fs.ls, directory, detail=True)):
            path = str(entry["name"]).rstrip("/")
            if entry["type"] != "directory":
                yield path, int(entry["size"])
            elif path != directory:
                yield from self._files(path)

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return bytes(self._retried(partial(self._fs.cat_file, f"{self._root}/{name}")))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._retried(partial(self._fs.pipe_file, f"{self._root}/{name}", data))

    def upload(self, local: Path, name: str) -> None:
        """Upload a local file.

        Raises:
            FileNotFoundError: the local file, or the bucket, does not exist.
        """
        self._retried(partial(self._fs.put_file, str(local), f"{self._root}/{name}"))

    def download(self, name: str, local: Path) -> None:
        """Download a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        self._retried(partial(self._fs.get_file, f"{self._root}/{name}", str(local)))

    def remove(self, name: str, *, recursive: bool = False) -> None:
        """Delete a file or a directory, if it exists."""
        self._fs.invalidate_cache()
        try:
            self._retried(partial(self._fs.rm, f"{self._root}/{name}", recursive=recursive))
        except FileNotFoundError:
            return

    def _retried(self, operation: Callable[[], T]) -> T:
        try:
            return retry(operation, pauses_s=self._pauses_s, is_transient=_is_transient)
        except FileNotFoundError:
            raise
        except Exception as error:  # each storage has its own error types
            if _is_refusal(error):
                remedy = "Check the credentials in the environment and their rights (docs/mirror.md)"
                raise MirrorAccessError(f"{self.address}: access refused: {first_line(error)}. {remedy}") from error
            raise MirrorError(f"{self.address}: {first_line(error)} (tried {TRIES} times)") from error


def _is_transient(error: Exception) -> bool:
    return not (isinstance(error, FileNotFoundError) or _is_refusal(error))


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or type(error).__name__ in ACCESS_ERRORS


def first_line(error: Exception) -> str:
    """First line of an error message; the type of the error if there is none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _file_system(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path on it."""
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
