"""Copies of checkpoints on other storage, and the way back.

    <address>/<run name>/step-000020/      the files of checkpoints/step-000020, manifest.json among them
    <address>/<run name>/step-000020/run/  what else a resume needs: metrics.jsonl up to that step, the best weights
    <address>/<run name>/step-000020/complete.json   the marker: sizes and sha256 of all of them

Object storage knows no rename. So the marker is written last and deleted first: a directory without one is no
checkpoint. No torch.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.checkpoints.storage import Storage, first_line
from trainer.errors import CheckpointError, MirrorError
from trainer.files import file_sha256, fsync_dir, fsync_file
from trainer.run.directory import RunDir, step_number

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
"""In a checkpoint directory, written last."""
MARKER: Final = "complete.json"
COPIES_WHILE_IT_CHANGES: Final = 5
"""Tries to link the best weights while the training loop puts better ones in their place."""


@final
@dataclass(frozen=True)
class _File:
    """What the marker says of one file."""

    num_bytes: int
    sha256: str


@final
@dataclass(frozen=True)
class _Marker:
    """A whole checkpoint on the mirror."""

    step: int
    identity_hash: str
    files: Mapping[str, _File]
    """By path under the step's directory."""

    def dump(self) -> bytes:
        files = {name: {"bytes": about.num_bytes, "sha256": about.sha256} for name, about in self.files.items()}
        about = {"format": FORMAT, "step": self.step, "identity_hash": self.identity_hash, "files": files}
        return json.dumps(about, indent=1).encode()


@final
class Mirror:
    """The mirror of one run; one push at a time, from any thread."""

    def __init__(
        self, address: str, run: RunDir, identity_hash: str, *, keep_last: int = 2, backoff_s: float = 1.0
    ) -> None:
        """Find the storage; nothing is read or written yet.

        Args:
            address: of fsspec, such as `s3://bucket/prefix`.
            run: what is mirrored; its name is the directory on the mirror.
            identity_hash: of the run; checkpoints of others are left alone.
            keep_last: checkpoints kept on the mirror.
            backoff_s: seconds before an operation that failed is tried again; doubled each time.

        Raises:
            UserError: fsspec does not know the address, or a package is missing.
        """
        self.run, self.identity_hash, self.keep_last = run, identity_hash, keep_last
        self.storage = Storage(f"{address}{'' if address.endswith('/') else '/'}{run.name}", backoff_s)
        self._damaged: set[int] = set()
        self._pushing = threading.Lock()

    def push(self, step: int) -> None:
        """Copy a committed checkpoint and what a resume elsewhere needs besides; then delete older copies.

        Does nothing where this step is on the mirror already.

        Raises:
            MirrorError: it could not be copied; what was whole on the mirror still is.
        """
        with self._pushing, self._snapshot(step) as (sources, marker):
            markers = self._markers()
            foreign = [old for old in markers.values() if old.identity_hash != self.identity_hash]
            if foreign:
                raise MirrorError(
                    f"{self.storage.address}: holds another run. Give this one another --name or another mirror"
                )
            if step not in markers or step in self._damaged or not self._has(markers[step]):
                self._remove(step)
                self._upload(sources, marker)
                self._damaged.discard(step)
            self._prune(step, markers)

    def fetch(self) -> int | None:
        """Bring the newest whole checkpoint of this run here, where there is none here.

        A damaged one is passed over with a warning. What lies in the run directory of the fetched kind, such as a
        metrics.jsonl, is replaced.

        Returns:
            Its step; None where there is a checkpoint directory here already, or none on the mirror.

        Raises:
            MirrorError: the mirror cannot be read, or the run directory cannot be written.
        """
        if self.run.newest_checkpoint_step() >= 0:
            return None
        for step, marker in sorted(self._markers().items(), reverse=True):
            if marker.identity_hash != self.identity_hash:
                continue
            try:
                self._bring(marker)
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
        """Steps that have a directory there, whole or not."""
        numbers = (step_number(name) for name in self.storage.names())
        return sorted(number for number in numbers if number is not None)

    def _markers(self) -> dict[int, _Marker]:
        """Checkpoints with a readable marker, by step."""
        found = {step: self._marker(step) for step in self._steps()}
        return {step: marker for step, marker in found.items() if marker is not None}

    def _marker(self, step: int) -> _Marker | None:
        try:
            about = json.loads(self.storage.read(f"{self._directory(step)}/{MARKER}"))
            files = {str(name): _File(int(file["bytes"]), file["sha256"]) for name, file in about["files"].items()}
            marker = _Marker(int(about["step"]), str(about["identity_hash"]), files)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # the upload was cut off
        return marker if marker.step == step else None

    def _directory(self, step: int) -> str:
        return self.run.checkpoint(step).name

    def _has(self, marker: _Marker) -> bool:
        """Whether every file is there in its size."""
        sizes = self.storage.sizes(self._directory(marker.step))
        return all(sizes.get(name) == about.num_bytes for name, about in marker.files.items())

    def _bring(self, marker: _Marker) -> None:
        """Download beside its place, verify, move into place; the checkpoint last, so that a kill begins again."""
        target = self.run.checkpoint(marker.step)
        staging = target.with_name(f".{target.name}.tmp")
        others = self.run.root / ".fetch.tmp"
        known = {path.relative_to(self.run.root).parts[0] for path in _beside(self.run)}
        try:
            for directory in (staging, others):
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
            for name, about in marker.files.items():
                local = _place(name, staging, others, known)
                if local is None:
                    raise CheckpointError(f"{self.storage.address}/{target.name}: {name} has no place in a checkpoint")
                self._download(marker.step, name, about, local)
            _verify_manifest(staging, marker, f"{self.storage.address}/{target.name}")
            for path in _beside(self.run):
                _replace(others / path.name, path)
            fsync_dir(self.run.root)
            staging.rename(target)
            fsync_dir(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(others, ignore_errors=True)

    def _download(self, step: int, name: str, about: _File, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        remote = f"{self._directory(step)}/{name}"
        try:
            self.storage.download(remote, local)
        except FileNotFoundError:
            raise CheckpointError(f"{self.storage.address}/{remote}: missing") from None
        if not local.is_file() or _about(local) != about:
            raise CheckpointError(f"{self.storage.address}/{remote}: damaged")
        fsync_file(local)

    def _upload(self, sources: Mapping[str, Path], marker: _Marker) -> None:
        """Files, then the marker."""
        directory = self._directory(marker.step)
        for name, local in sources.items():
            try:
                self.storage.upload(local, f"{directory}/{name}")
            except FileNotFoundError as error:
                is_ours = not local.exists()  # newer checkpoints came faster than this one could be copied
                where = f"{local}: is gone" if is_ours else f"{self.storage.address}: {first_line(error)}"
                raise MirrorError(f"{where}; step {marker.step} is not mirrored") from None
        if not self._has(marker):
            raise MirrorError(f"{self.storage.address}/{directory}: files did not arrive in their sizes")
        self.storage.write(f"{directory}/{MARKER}", marker.dump())

    def _prune(self, newest: int, markers: Mapping[int, _Marker]) -> None:
        """Delete copies older than the newest, but the last ones, and what cut-off uploads left."""
        older = [step for step in self._steps() if step < newest]
        whole = [step for step in older if step in markers and step not in self._damaged]
        kept = whole[-(self.keep_last - 1) :] if self.keep_last > 1 else []
        for step in older:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """The marker first: from there on it is no checkpoint."""
        self.storage.remove(f"{self._directory(step)}/{MARKER}")
        self.storage.remove(self._directory(step), recursive=True)

    @contextmanager
    def _snapshot(self, step: int) -> Iterator[tuple[dict[str, Path], _Marker]]:
        """Everything to copy, held still while training goes on: local files by name there, and the marker to be."""
        checkpoint, held = self.run.checkpoint(step), self.run.root / ".mirror.tmp"
        shutil.rmtree(held, ignore_errors=True)
        try:
            try:
                held.mkdir()
                manifest = json.loads((checkpoint / MANIFEST).read_bytes())
                files = {
                    str(name): _File(int(file["bytes"]), file["sha256"]) for name, file in manifest["files"].items()
                }
                sources = {name: checkpoint / name for name in (*files, MANIFEST)}
                lines = [json.dumps(record) + "\n" for record in self.run.read_metrics() if record["step"] <= step]
                (held / self.run.metrics_file.name).write_text("".join(lines))
                for path in _beside(self.run):
                    if path != self.run.metrics_file:
                        _hold(path, held / path.name)
                beside = sorted(file for file in held.rglob("*") if file.is_file())
                sources |= {f"run/{file.relative_to(held).as_posix()}": file for file in beside}
                files |= {name: _about(sources[name]) for name in sources if name not in files}
            except (OSError, ValueError, KeyError) as error:
                raise MirrorError(f"{checkpoint}: not copied to {self.storage.address}: {first_line(error)}") from error
            yield sources, _Marker(step, self.identity_hash, files)
        finally:
            shutil.rmtree(held, ignore_errors=True)


def _beside(run: RunDir) -> tuple[Path, ...]:
    """What a resume needs besides the checkpoint; all but metrics.jsonl may be missing."""
    best = (run.weights(is_lora=is_lora, best=True) for is_lora in (True, False))
    return (run.metrics_file, run.tracker_file, run.excluded_file, *best)


def _place(name: str, checkpoint: Path, others: Path, known: set[str]) -> Path | None:
    """Where a file of a marker is put; None for a name that this module never writes."""
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\\" in name:
        return None
    if len(parts) == 1:
        return checkpoint / name
    return others.joinpath(*parts[1:]) if parts[0] == "run" and parts[1] in known else None


def _verify_manifest(staging: Path, marker: _Marker, where: str) -> None:
    """Stop where marker and manifest do not say the same."""
    try:
        manifest = json.loads((staging / MANIFEST).read_bytes())
        files = {name: _File(file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
        is_same = (manifest["step"], manifest["identity_hash"]) == (marker.step, marker.identity_hash)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: no readable manifest ({type(error).__name__})") from None
    if not is_same or files != {
        name: marker.files[name] for name in marker.files if "/" not in name and name != MANIFEST
    }:
        raise CheckpointError(f"{where}: its manifest is of another checkpoint")
    if "run/metrics.jsonl" not in marker.files:
        raise CheckpointError(f"{where}: lists no metrics")


def _replace(source: Path, target: Path) -> None:
    """Put source in the target's place; a target without a source is removed, since it is of another past."""
    if target.is_dir():
        shutil.rmtree(target)
    if source.exists():
        source.replace(target)
    else:
        target.unlink(missing_ok=True)


def _hold(path: Path, held: Path) -> None:
    """Copy a file or link a directory as it is now; the training loop replaces them and rewrites nothing."""
    for _ in range(COPIES_WHILE_IT_CHANGES):
        try:
            if path.is_file():
                shutil.copyfile(path, held)
                return
            if _is_held_whole(path, held):
                return
        except FileNotFoundError:
            if not path.exists() and not path.with_name(f".{path.name}.old").exists():
                return  # there is none
        except shutil.Error:
            pass  # replaced meanwhile
        shutil.rmtree(held, ignore_errors=True)
        held.unlink(missing_ok=True)
        time.sleep(0.05)
    raise OSError(f"{path}: changes faster than it can be copied")


def _is_held_whole(directory: Path, held: Path) -> bool:
    """Link a directory's files; False where another directory has taken its place meanwhile."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # an inode number is not used again while it is open
    try:
        shutil.copytree(directory, held, copy_function=_link)
        return directory.stat().st_ino == os.fstat(handle).st_ino
    finally:
        os.close(handle)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)
    return target


def _about(file: Path) -> _File:
    return _File(file.stat().st_size, file_sha256(file))
