"""Writes checkpoints in the background, and loads the newest valid one.

The format is torch Distributed Checkpoint (DCP). The DCP files hold tensors only. Scalars are in manifest.json, which
is written last: a directory without a valid manifest is not a checkpoint. A save blocks the training only while it
copies the tensors. A thread then writes the copies into a temporary directory, hashes them and renames the directory;
it has a process group of its own. Only one save is in progress at a time.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Collection, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import final

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.checkpoints.manifest import MANIFEST, FileDigest, Inventory, Manifest, verified_manifest
from trainer.checkpoints.reader import SafeReader
from trainer.checkpoints.uploader import Uploader
from trainer.config.recipe import Recipe
from trainer.distributed.sharding import copied_to_cpu, local_of
from trainer.distributed.world import World
from trainer.errors import CheckpointError, TrainerError
from trainer.files import fsync_dir, fsync_file, make_directory, write_atomically
from trainer.run.directory import RunDir


@final
@dataclass(frozen=True)
class TrainState:
    """The scalars of a checkpoint, for example step 20 and {"updates": 40}."""

    step: int
    counters: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further state, the same on all ranks, by the name of its file in the checkpoint."""


@final
@dataclass(frozen=True)
class Saved:
    """Result of a save; the same on all ranks, except for the seconds."""

    step: int
    seconds: float
    """From the copy of the tensors to the end of the save."""
    problem: str | None = None
    """Why there is no checkpoint of this step; older checkpoints are intact. None if the save succeeded."""


@final
class Checkpoints:
    """The checkpoints of one run on the local disk."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        identity_hash: str,
        world: World,
        attempt: int,
        uploader: Uploader | None = None,
    ) -> None:
        """Prepare to save and load; every rank calls this.

        Args:
            run: whose directory holds the checkpoints.
            recipe: says how many checkpoints are kept.
            identity_hash: of the plan; checkpoints of another run are refused.
            world: the ranks.
            attempt: number of this process start; only the newest attempt may commit.
            uploader: gets each committed checkpoint; None without a mirror.
        """
        self.uploader = uploader or Uploader(None, say=lambda _: None)
        self.run, self.recipe, self.identity_hash = run, recipe, identity_hash
        self.world, self.attempt = world, attempt
        self._writer_world = world.apart()
        device = world.device  # a thread that sets none would open a context on GPU 0
        use_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=use_device)
        self._pending: Future[Saved] | None = None
        self._copies: dict[str, torch.Tensor] = {}

    def begin(self, state: TrainState, tensors: Mapping[str, torch.Tensor], keep: int | None = None) -> None:
        """Copy a step's tensors and start writing them; every rank calls this, after the last save was collected.

        Args:
            state: step and counters.
            tensors: the tensors of the training state by name.
            keep: an older step whose checkpoint is kept regardless of `keep_last`.
        """
        assert self._pending is None, "the last save was not collected"
        for name, tensor in tensors.items():
            if name in self._copies:
                local_of(self._copies[name]).copy_(local_of(tensor.detach()))
            else:
                self._copies[name] = copied_to_cpu(tensor)
        self._pending = self._writer.submit(self._save, state, keep, time.perf_counter())

    def collect(self, *, wait: bool) -> Saved | None:
        """Result of the pending save; None if there is none, or it is unfinished and not awaited."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        saved, self._pending = self._pending.result(), None
        return saved

    def close(self, timeout_s: float) -> None:
        """Wait up to timeout_s for the pending save; no save may follow."""
        if self._pending is not None:
            futures.wait([self._pending], timeout_s)
        self._writer.shutdown(wait=False)

    def _save(self, state: TrainState, keep: int | None, start: float) -> Saved:
        """Write, hash, fsync and rename. Returns problems instead of raising, since it runs in a thread."""
        target = self.run.checkpoint(state.step)
        staging = target.with_name(f".{target.name}.tmp")
        _, problem = self._writer_world.on_main(lambda: self._prepare(staging), (OSError, TrainerError))
        if problem is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # DCP warns when there is a single process
                    state_dict_saver.save(
                        dict(self._copies),
                        storage_writer=FileSystemWriter(staging, sync_files=True),
                        process_group=self._writer_world.group,
                    )
            except (Exception, CheckpointException) as error:  # DCP wraps the errors of all ranks
                problem = _root_cause(error)
            problem = self._any_problem(problem)
        if problem is None:
            _, problem = self._writer_world.on_main(
                lambda: self._commit(staging, target, state), (OSError, TrainerError)
            )
        if self.world.is_main:
            if problem is None:
                self.uploader.offer(state.step)
                self._prune(state.step, keep)
            else:
                shutil.rmtree(staging, ignore_errors=True)
        return Saved(state.step, time.perf_counter() - start, problem and f"{target}: not written: {problem}")

    def _any_problem(self, problem: str | None) -> str | None:
        """The first problem of any rank."""
        problems = self._writer_world.gather(problem)
        return next((text for text in problems if text), None)

    def _prepare(self, staging: Path) -> None:
        self.run.refuse_stale(self.attempt)
        shutil.rmtree(staging, ignore_errors=True)
        make_directory(staging.parent)
        staging.mkdir()

    def _commit(self, staging: Path, target: Path, state: TrainState) -> None:
        for name, text in state.texts.items():
            (staging / name).write_text(text)
        files = [file for file in sorted(staging.iterdir()) if file.name != MANIFEST]
        inventory = Inventory(state.step, self.identity_hash, {file.name: FileDigest.of(file) for file in files})
        for file in files:
            fsync_file(file)
        write_atomically(staging / MANIFEST, Manifest(inventory, state.counters, self.world.size).dump())
        self.run.refuse_stale(self.attempt)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        fsync_dir(target.parent)

    def load_newest(self, tensors: Mapping[str, torch.Tensor], texts: Collection[str] = ()) -> TrainState | None:
        """Load the newest valid checkpoint into the given tensors; every rank calls this.

        Damaged checkpoints are renamed, with a warning. The placement of the tensors and the number of ranks may differ
        from those of the save.

        Args:
            tensors: to load into.
            texts: names of further state to read, where the checkpoint has it.

        Returns:
            Its step, counters and texts; None if there is no valid checkpoint.

        Raises:
            CheckpointError: the files are undamaged and yet DCP cannot read them.
            MirrorError: there is none here, and the mirror cannot be read.
        """
        newest: tuple[Path, TrainState] | None = None
        if self.world.is_main:
            newest = self._newest_local_or_mirrored(tensors)
            if newest is not None:
                newest = newest[0], replace(newest[1], texts=_texts(newest[0], texts))
        newest = self.world.from_main(newest)
        if newest is None:
            return None
        directory, state = newest
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state_dict_loader.load(dict(tensors), storage_reader=SafeReader(directory))
        except (Exception, CheckpointException) as error:
            remedy = "Move this directory away to resume from the checkpoint before it."
            raise CheckpointError(f"{directory}: cannot be read: {_root_cause(error)}. {remedy}") from error
        return state

    def steps(self) -> list[int]:
        """Steps with a checkpoint directory, ascending."""
        return self.run.checkpoint_steps()

    def _newest_local_or_mirrored(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Path, TrainState] | None:
        """Fetch from the mirror if there is no local checkpoint, or if all of them turn out to be damaged."""
        self.uploader.fetch()
        newest = self._newest_valid(tensors)
        if newest is None and not self.steps():
            self.uploader.fetch()
            newest = self._newest_valid(tensors)
        return newest

    def _newest_valid(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Path, TrainState] | None:
        for half_written in self.run.unfinished_checkpoints():
            shutil.rmtree(half_written, ignore_errors=True)
        for step in reversed(self.steps()):
            directory = self.run.checkpoint(step)
            try:
                manifest = self._verified(directory, tensors)
            except CheckpointError as error:
                renamed = _unused_name(directory)
                directory.rename(renamed)
                warnings.warn(f"{error}; moved to {renamed.name}, taking the one before", stacklevel=2)
            else:
                return directory, TrainState(manifest.inventory.step, manifest.counters)
        return None

    def _verified(self, directory: Path, tensors: Mapping[str, torch.Tensor]) -> Manifest:
        manifest = verified_manifest(directory, self.identity_hash)
        entries = SafeReader(directory).read_metadata().state_dict_metadata
        sizes = {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        if sizes != {name: tensor.size() for name, tensor in tensors.items()}:
            raise CheckpointError(f"{directory}: its tensors are not those of this run")
        return manifest

    def _prune(self, newest: int, keep: int | None) -> None:
        """Remove all but the last `keep_last`, every `keep_every`, `keep`, and those waiting to be uploaded."""
        every = self.recipe.keep_every
        older = [step for step in self.steps() if step <= newest]
        for step in older[: -self.recipe.keep_last]:
            if step != keep and step not in self.uploader.held() and not (every and step % every == 0):
                shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)


def _texts(directory: Path, names: Collection[str]) -> dict[str, str]:
    """The texts of a verified checkpoint, where it has them."""
    return {name: (directory / name).read_text() for name in names if (directory / name).exists()}


def _unused_name(directory: Path) -> Path:
    """The first of `step-000020.broken-1`, `step-000020.broken-2`, ... that does not exist."""
    candidates = (directory.with_name(f"{directory.name}.broken-{number}") for number in count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return str(error).splitlines()[0] if str(error) else type(error).__name__
