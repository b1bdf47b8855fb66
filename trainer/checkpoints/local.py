"""Checkpoints: torch DCP, written aside while training goes on, hashed, renamed; the newest valid one wins.

A checkpoint holds tensors only. Scalars stand in manifest.json, which is written last: a directory without a manifest
that verifies is no checkpoint. A save copies the tensors, which is all that the step waits for; a thread writes the
copies with collectives of its own. One save at a time.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.checkpoints.mirror import MANIFEST
from trainer.checkpoints.reader import SafeReader
from trainer.checkpoints.uploader import Copier
from trainer.config.recipe import Recipe
from trainer.distributed.sharding import copied_to_cpu, local_of
from trainer.distributed.world import World
from trainer.errors import CheckpointError, TrainerError
from trainer.files import file_sha256, fsync_dir, fsync_file, make_directory, write_atomically
from trainer.run.directory import RunDir

FORMAT: Final = 1


@final
@dataclass
class TrainState:
    """What a run is, besides tensors: the step and counters."""

    step: int = 0
    counters: dict[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Saved:
    """How a save ended; equal on all ranks but for the seconds."""

    step: int
    seconds: float
    """From the copy to the rename."""
    problem: str | None = None
    """Why there is no checkpoint; older ones are intact."""


@final
class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        identity_hash: str,
        world: World,
        attempt: int,
        copier: Copier | None = None,
    ) -> None:
        """Open the run's checkpoint directory; every rank calls it. What is committed goes to the copier."""
        self.copier = copier or Copier(None, say=lambda _: None)
        self.run, self.recipe, self.identity_hash = run, recipe, identity_hash
        self.world, self.attempt = world, attempt
        self._apart = world.apart()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None
        self._copies: dict[str, torch.Tensor] = {}

    def begin(self, state: TrainState, tensors: Mapping[str, torch.Tensor], keep: int | None = None) -> None:
        """Copy a step's tensors and begin to write them; every rank calls it, none before `collect(wait=True)`.

        Args:
            state: step and counters.
            tensors: everything else.
            keep: an older step whose checkpoint `keep_last` must not remove.
        """
        assert self._pending is None, "one save at a time"
        for name, tensor in tensors.items():
            if name in self._copies:
                local_of(self._copies[name]).copy_(local_of(tensor.detach()))
            else:
                self._copies[name] = copied_to_cpu(tensor)
        frozen = TrainState(state.step, dict(state.counters))
        self._pending = self._writer.submit(self._save, frozen, keep, time.perf_counter())

    def collect(self, *, wait: bool) -> Saved | None:
        """How the save that was begun has ended; None where none was, or where it goes on and is not waited for."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        saved, self._pending = self._pending.result(), None
        return saved

    def close(self, timeout_s: float) -> None:
        """Let the save that was begun end, for so long."""
        end = time.monotonic() + timeout_s
        while self._pending is not None and not self._pending.done() and time.monotonic() < end:
            time.sleep(0.01)
        self._writer.shutdown(wait=False)

    def _save(self, state: TrainState, keep: int | None, begun: float) -> Saved:
        """Write, hash, fsync and rename; never raises, since nobody waits for it."""
        target = self.run.checkpoint(state.step)
        staging = target.with_name(f".{target.name}.tmp")
        _, problem = self._apart.on_main(lambda: self._prepare(staging), (OSError, TrainerError))
        if problem is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # DCP warns of single-process use
                    state_dict_saver.save(
                        dict(self._copies),
                        storage_writer=FileSystemWriter(staging, sync_files=True),
                        process_group=self._apart.group,
                    )
            except (Exception, CheckpointException) as error:  # DCP wraps whatever a rank's disk raised
                problem = _root_cause(error)
            problem = self._any_problem(problem)
        if problem is None:
            _, problem = self._apart.on_main(lambda: self._commit(staging, target, state), (OSError, TrainerError))
        if self.world.is_main:
            if problem is None:
                self.copier.offer(state.step)
                self._prune(state.step, keep)
            else:
                shutil.rmtree(staging, ignore_errors=True)
        return Saved(state.step, time.perf_counter() - begun, problem and f"{target}: not written: {problem}")

    def _any_problem(self, problem: str | None) -> str | None:
        found = [text for text in self._apart.gather(problem) if text]
        return found[0] if found else None

    def _prepare(self, staging: Path) -> None:
        self.run.refuse_stale(self.attempt)
        shutil.rmtree(staging, ignore_errors=True)
        make_directory(staging.parent)
        staging.mkdir()

    def _commit(self, staging: Path, target: Path, state: TrainState) -> None:
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(staging.iterdir())
            if file.name != MANIFEST
        }
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "counters": state.counters,
            "world_size": self.world.size,
            "identity_hash": self.identity_hash,
            "files": files,
        }
        for name in files:
            fsync_file(staging / name)
        write_atomically(staging / MANIFEST, json.dumps(manifest, indent=1))
        self.run.refuse_stale(self.attempt)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        fsync_dir(target.parent)

    def load_newest(self, tensors: Mapping[str, torch.Tensor]) -> TrainState | None:
        """Read the newest valid checkpoint into the given tensors; every rank calls it.

        Broken ones are moved aside with a warning. The tensors' placement and number of ranks may differ from those
        that saved.

        Returns:
            Its step and counters, or None where there is no valid checkpoint.

        Raises:
            CheckpointError: DCP cannot read what verified.
        """
        chosen = self._newest_here_or_mirrored(tensors) if self.world.is_main else None
        chosen = self.world.from_main(chosen)
        if chosen is None:
            return None
        directory, manifest = chosen
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state_dict_loader.load(dict(tensors), storage_reader=SafeReader(directory))
        except (
            Exception,
            CheckpointException,
        ) as error:  # its bytes are what was written, and yet DCP cannot read them
            remedy = "Move it away to go on from the one before."
            raise CheckpointError(f"{directory}: cannot be read: {_root_cause(error)}. {remedy}") from error
        return TrainState(manifest["step"], manifest["counters"])

    def steps(self) -> list[int]:
        """Steps that have a checkpoint directory, ascending."""
        return self.run.checkpoint_steps()

    def _newest_here_or_mirrored(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Path, dict[str, Any]] | None:
        """The mirror serves where nothing is here, from the start or since all were broken."""
        self.copier.fetch()
        found = self._newest_valid(tensors)
        if found is None and not self.steps():
            self.copier.fetch()
            found = self._newest_valid(tensors)
        return found

    def _newest_valid(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Path, dict[str, Any]] | None:
        for half_written in self.run.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(half_written, ignore_errors=True)
        for step in reversed(self.steps()):
            directory = self.run.checkpoint(step)
            try:
                return directory, self._verified(directory, tensors)
            except CheckpointError as error:
                aside = _free_name(directory)
                directory.rename(aside)
                warnings.warn(f"{error}; moved to {aside.name}, taking the one before", stacklevel=2)
        return None

    def _verified(self, directory: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
            files = {str(name): (int(about["bytes"]), about["sha256"]) for name, about in manifest["files"].items()}
            identity, _step, _counters = manifest["identity_hash"], int(manifest["step"]), dict(manifest["counters"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory}: no readable manifest ({type(error).__name__})") from None
        if identity != self.identity_hash:
            raise CheckpointError(f"{directory}: belongs to another run")
        if ".metadata" not in files:
            raise CheckpointError(f"{directory}: lists no metadata")
        for name, (size, sha256) in files.items():
            file = directory / name
            if Path(name).name != name or not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size != size or file_sha256(file) != sha256:
                raise CheckpointError(f"{file}: damaged")
        entries = SafeReader(directory).read_metadata().state_dict_metadata
        sizes = {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        if sizes != {name: tensor.size() for name, tensor in tensors.items()}:
            raise CheckpointError(f"{directory}: holds other tensors than this run has")
        return manifest

    def _prune(self, newest: int, keep: int | None) -> None:
        every = self.recipe.keep_every
        ours = [step for step in self.steps() if step <= newest]
        for step in ours[: -self.recipe.keep_last]:
            if step != keep and step not in self.copier.held() and not (every and step % every == 0):
                shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)


def _free_name(directory: Path) -> Path:
    number = 1
    while (aside := directory.with_name(f"{directory.name}.broken-{number}")).exists():
        number += 1
    return aside


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return str(error).splitlines()[0] if str(error) else type(error).__name__
