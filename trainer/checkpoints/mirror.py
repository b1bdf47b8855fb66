"""Copies checkpoints to remote storage, and fetches the newest one on a fresh machine.

    <address>/<run name>/step-000020/      the files of checkpoints/step-000020, manifest.json among them
    <address>/<run name>/step-000020/run/  other files that a resume needs: metrics.jsonl up to that step, best weights
    <address>/<run name>/step-000020/complete.json   the marker: size and SHA-256 of every file above

Object storage has no rename. The marker is therefore written last and deleted first: a directory without a marker is
not a checkpoint. No torch.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Final, final

from trainer.checkpoints.manifest import MANIFEST, FileDigest, Inventory, Manifest
from trainer.checkpoints.storage import Storage, first_line
from trainer.errors import CheckpointError, MirrorError
from trainer.files import fsync_dir, fsync_file
from trainer.retry import retry
from trainer.run.directory import RunDir
from trainer.run.step_names import step_number

MARKER: Final = "complete.json"
SNAPSHOT_TRIES: Final = 5
"""Attempts to copy the best weights while the training may replace them."""
SNAPSHOT_PAUSE_S: Final = 0.05


class _ReplacedError(Exception):
    """A file or directory was replaced while it was copied."""


@final
class Mirror:
    """The mirror of one run; `push` may be called from any thread, and runs one push at a time."""

    def __init__(
        self, address: str, run: RunDir, identity_hash: str, *, keep_last: int = 2, backoff_s: float = 1.0
    ) -> None:
        """Find the file system of the address; nothing is read or written yet.

        Args:
            address: an fsspec address, such as `s3://bucket/prefix`.
            run: what is mirrored; its name is the directory on the mirror.
            identity_hash: of the run; checkpoints of other runs are not touched.
            keep_last: number of checkpoints kept on the mirror.
            backoff_s: seconds before a failed operation is retried; doubled each time.

        Raises:
            UserError: fsspec does not know the address, or a package is missing.
        """
        self.run, self.identity_hash, self.keep_last = run, identity_hash, keep_last
        self.storage = Storage(f"{address}{'' if address.endswith('/') else '/'}{run.name}", backoff_s)
        self._damaged: set[int] = set()
        self._pushing = threading.Lock()

    def push(self, step: int) -> None:
        """Copy a committed checkpoint and the other files that a resume needs; then delete older copies.

        Does nothing if the mirror has this step already.

        Raises:
            MirrorError: it could not be copied; earlier copies are intact.
        """
        with self._pushing, self._snapshot(step) as (sources, marker):
            markers = self._markers()
            if any(existing.identity_hash != self.identity_hash for existing in markers.values()):
                raise MirrorError(
                    f"{self.storage.address}: holds another run. Give this one another --name or another mirror"
                )
            if step not in markers or step in self._damaged or not self._has_all_files(markers[step]):
                self._remove(step)
                self._upload(sources, marker)
                self._damaged.discard(step)
            self._prune(step, markers)

    def fetch(self) -> int | None:
        """Download the newest complete checkpoint of this run, if there is no local checkpoint.

        A damaged copy is skipped with a warning. Files of the run directory that come with the checkpoint, such as
        metrics.jsonl, are replaced.

        Returns:
            Its step; None if there is a local checkpoint directory, or no checkpoint on the mirror.

        Raises:
            MirrorError: the mirror cannot be read, or the run directory cannot be written.
        """
        if self.run.newest_checkpoint_step() >= 0:
            return None
        for step, marker in sorted(self._markers().items(), reverse=True):
            if marker.identity_hash != self.identity_hash:
                continue
            try:
                self._download_checkpoint(marker)
            except CheckpointError as error:
                self._damaged.add(step)
                warnings.warn(f"{error}; taking the one before", stacklevel=2)
            except OSError as error:
                raise MirrorError(
                    f"{self.run.root}: not fetched from {self.storage.address}: {first_line(error)}"
                ) from error
            else:
                return step
        return None

    def _steps(self) -> list[int]:
        """Steps with a directory on the mirror, complete or not."""
        numbers = (step_number(name) for name in self.storage.names())
        return sorted(number for number in numbers if number is not None)

    def _markers(self) -> dict[int, Inventory]:
        """The readable markers by step."""
        markers = {step: self._marker(step) for step in self._steps()}
        return {step: marker for step, marker in markers.items() if marker is not None}

    def _marker(self, step: int) -> Inventory | None:
        """The marker of a step; None if the upload was interrupted."""
        try:
            marker = Inventory.parse(self.storage.read(f"{self._directory(step)}/{MARKER}"))
        except (FileNotFoundError, ValueError):
            return None
        return marker if marker.step == step else None

    def _directory(self, step: int) -> str:
        return self.run.checkpoint(step).name

    def _has_all_files(self, marker: Inventory) -> bool:
        """Whether every file is on the mirror with the right size."""
        sizes = self.storage.sizes(self._directory(marker.step))
        return all(sizes.get(name) == digest.num_bytes for name, digest in marker.files.items())

    def _download_checkpoint(self, marker: Inventory) -> None:
        """Download into temporary directories, verify, and move into place.

        The checkpoint directory is moved last, so a fetch that is killed starts again.
        """
        target = self.run.checkpoint(marker.step)
        staging = target.with_name(f".{target.name}.tmp")
        extras = self.run.root / ".fetch.tmp"
        allowed = {path.relative_to(self.run.root).parts[0] for path in _extra_files(self.run)}
        remote = f"{self.storage.address}/{target.name}"
        try:
            for directory in (staging, extras):
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
            for name, digest in marker.files.items():
                local = _local_path(name, staging, extras, allowed)
                if local is None:
                    raise CheckpointError(f"{remote}: {name} has no place in a checkpoint")
                self._download_file(marker.step, name, digest, local)
            _verify_manifest(staging, marker, remote)
            for path in _extra_files(self.run):
                _replace(extras / path.name, path)
            fsync_dir(self.run.root)
            staging.rename(target)
            fsync_dir(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(extras, ignore_errors=True)

    def _download_file(self, step: int, name: str, digest: FileDigest, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        remote = f"{self._directory(step)}/{name}"
        try:
            self.storage.download(remote, local)
        except FileNotFoundError:
            raise CheckpointError(f"{self.storage.address}/{remote}: missing") from None
        if not local.is_file() or FileDigest.of(local) != digest:
            raise CheckpointError(f"{self.storage.address}/{remote}: damaged")
        fsync_file(local)

    def _upload(self, sources: Mapping[str, Path], marker: Inventory) -> None:
        """Upload the files, then the marker."""
        directory = self._directory(marker.step)
        for name, local in sources.items():
            try:
                self.storage.upload(local, f"{directory}/{name}")
            except FileNotFoundError as error:
                # A missing local file was pruned because newer checkpoints came faster than this one was uploaded.
                problem = f"{self.storage.address}: {first_line(error)}" if local.exists() else f"{local}: is gone"
                raise MirrorError(f"{problem}; step {marker.step} is not mirrored") from None
        if not self._has_all_files(marker):
            raise MirrorError(f"{self.storage.address}/{directory}: uploaded files are missing or have another size")
        self.storage.write(f"{directory}/{MARKER}", marker.dump().encode())

    def _prune(self, newest: int, markers: Mapping[int, Inventory]) -> None:
        """Delete copies older than `newest` except the last `keep_last`, and the files of interrupted uploads."""
        older = [step for step in self._steps() if step < newest]
        complete = [step for step in older if step in markers and step not in self._damaged]
        kept = complete[-(self.keep_last - 1) :] if self.keep_last > 1 else []
        for step in older:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Delete a copy, its marker first, so that an interrupted deletion does not leave a checkpoint."""
        self.storage.remove(f"{self._directory(step)}/{MARKER}")
        self.storage.remove(self._directory(step), recursive=True)

    @contextmanager
    def _snapshot(self, step: int) -> Iterator[tuple[dict[str, Path], Inventory]]:
        """Snapshot of the files to upload, by their name on the mirror, and their inventory.

        The training goes on and replaces files of the run directory, so these are copied or hard-linked.
        """
        checkpoint, snapshot = self.run.checkpoint(step), self.run.root / ".mirror.tmp"
        shutil.rmtree(snapshot, ignore_errors=True)
        try:
            try:
                snapshot.mkdir()
                files = dict(Manifest.parse((checkpoint / MANIFEST).read_bytes()).inventory.files)
                sources = {name: checkpoint / name for name in (*files, MANIFEST)}
                lines = [json.dumps(record) + "\n" for record in self.run.read_metrics() if record["step"] <= step]
                (snapshot / self.run.metrics_file.name).write_text("".join(lines))
                for path in _extra_files(self.run):
                    if path != self.run.metrics_file:
                        take_snapshot(path, snapshot / path.name)
                extras = sorted(file for file in snapshot.rglob("*") if file.is_file())
                sources |= {f"run/{file.relative_to(snapshot).as_posix()}": file for file in extras}
                files |= {name: FileDigest.of(sources[name]) for name in sources if name not in files}
            except (OSError, ValueError, KeyError) as error:
                raise MirrorError(f"{checkpoint}: not copied to {self.storage.address}: {first_line(error)}") from error
            yield sources, Inventory(step, self.identity_hash, files)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)


def _extra_files(run: RunDir) -> tuple[Path, ...]:
    """Files that a resume needs besides the checkpoint; only metrics.jsonl always exists."""
    best = (run.weights(is_lora=is_lora, best=True) for is_lora in (True, False))
    return (run.metrics_file, run.tracker_file, run.excluded_file, run.held_out_file, *best)


def _local_path(name: str, checkpoint: Path, extras: Path, allowed: set[str]) -> Path | None:
    """Where a file that a marker lists is downloaded to; None for a name that a push never writes."""
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\\" in name:
        return None
    if len(parts) == 1:
        return checkpoint / name
    return extras.joinpath(*parts[1:]) if parts[0] == "run" and parts[1] in allowed else None


def _verify_manifest(staging: Path, marker: Inventory, remote: str) -> None:
    """Check that marker and manifest list the same files of the same checkpoint."""
    try:
        manifest = Manifest.parse((staging / MANIFEST).read_bytes()).inventory
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{remote}: no readable manifest ({first_line(error)})") from None
    files = {name: digest for name, digest in marker.files.items() if "/" not in name and name != MANIFEST}
    if manifest != Inventory(marker.step, marker.identity_hash, files):
        raise CheckpointError(f"{remote}: its manifest is of another checkpoint")
    if "run/metrics.jsonl" not in marker.files:
        raise CheckpointError(f"{remote}: lists no metrics")


def _replace(source: Path, target: Path) -> None:
    """Move source to target; without a source, remove the target: it belongs to a discarded history."""
    if target.is_dir():
        shutil.rmtree(target)
    if source.exists():
        source.replace(target)
    else:
        target.unlink(missing_ok=True)


def take_snapshot(path: Path, copy: Path) -> None:
    """Copy a file or hard-link a directory as it is now; without either, do nothing.

    The training replaces files and directories as a whole and never rewrites them in place, so links are safe.

    Raises:
        OSError: it was replaced again during each of several tries.
    """
    try:
        retry(
            lambda: _try_snapshot(path, copy),
            pauses_s=repeat(SNAPSHOT_PAUSE_S, SNAPSHOT_TRIES - 1),
            is_transient=lambda error: isinstance(error, _ReplacedError),
        )
    except _ReplacedError:
        raise OSError(f"{path}: was replaced during each of {SNAPSHOT_TRIES} attempts to copy it") from None


def _try_snapshot(path: Path, copy: Path) -> None:
    """Copy once; on an error nothing is left of the copy."""
    try:
        if path.is_file():
            shutil.copyfile(path, copy)
        elif not _link_directory(path, copy):
            raise _ReplacedError
    except (FileNotFoundError, shutil.Error, _ReplacedError) as error:
        shutil.rmtree(copy, ignore_errors=True)
        copy.unlink(missing_ok=True)
        is_absent = not path.exists() and not path.with_name(f".{path.name}.old").exists()
        if not (isinstance(error, FileNotFoundError) and is_absent):
            raise _ReplacedError from None


def _link_directory(directory: Path, copy: Path) -> bool:
    """Hard-link a directory's files; False if the directory was replaced meanwhile."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # an inode number is not reused while it is open
    try:
        shutil.copytree(directory, copy, copy_function=_link)
        return directory.stat().st_ino == os.fstat(handle).st_ino
    finally:
        os.close(handle)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # this file system has no hard links
        shutil.copyfile(source, target)
    return target
