"""Saved states of a slot: what it takes to continue, and what it takes to sample.

A state is one directory: `masters/` and `optimizer/` tensors in DCP's format, the adapter as PEFT reads it, state.json
with the settings, and manifest.json with the digest of every file. Names do not depend on the slot. So a state
continues here or on another server, and is an adapter directory for `trainer export`, `serve` and `lora.warm_start`.
A sampler state is the same without DCP files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from trainer.api.slots import Base, Slot
from trainer.checkpoints.manifest import MANIFEST, Manifest
from trainer.checkpoints.saved_state import STATE_FILE, StateSettings, identity_of, state_problem
from trainer.checkpoints.single import read_tensors, write_manifest, write_tensors
from trainer.config.recipe import LoraSettings
from trainer.errors import CheckpointError, TrainerError
from trainer.files import replaced_directory, write_atomically
from trainer.model.adapters import RUN_ADAPTER
from trainer.training.learner import MASTER_PREFIX


def save_state(
    slot: Slot, target: Path, *, optimizer: bool = True, counters: Mapping[str, float] | None = None
) -> None:
    """Write the state of a slot as a whole; what was there is replaced.

    Args:
        slot: its weights, and with `optimizer` what it takes to continue. A gradient that no update used is not saved.
        target: the directory.
        optimizer: whether the state is one to continue from.
        counters: further scalars of the manifest.

    Raises:
        CheckpointError: it could not be written; what was there is intact.
    """
    save_snapshot(Snapshot.of(slot, optimizer=optimizer, counters=counters), target)


@final
@dataclass(frozen=True)
class Snapshot:
    """A copy of a slot's state, which may be written while the slot goes on."""

    slot: Slot
    settings: StateSettings
    tensors: Mapping[str, torch.Tensor]
    masters: Mapping[str, torch.Tensor]
    """Empty: no adapter is written, which is for the server's own checkpoints."""
    counters: Mapping[str, float]

    @classmethod
    def of(
        cls,
        slot: Slot,
        *,
        optimizer: bool = True,
        adapter: bool = True,
        counters: Mapping[str, float] | None = None,
    ) -> Snapshot:
        """Copy to the CPU; see `save_state`."""
        learner = slot.learner
        base = slot.base
        settings = StateSettings(base.digest, base.settings.path, slot.lora, learner.updates, optimizer)
        tensors = {}
        if optimizer:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _named(slot).items()}
        masters = {}
        if adapter:
            masters = {name: tensor.detach().to("cpu", copy=True) for name, tensor in learner.masters.items()}
        return cls(slot, settings, tensors, masters, {"updates": learner.updates, **(counters or {})})


def save_snapshot(snapshot: Snapshot, target: Path) -> None:
    """Write a copied state; see `save_state`."""
    slot, settings = snapshot.slot, snapshot.settings
    document = {
        "base": settings.base,
        "model": settings.model,
        "lora": settings.lora.model_dump(),
        "updates": settings.updates,
        "has_optimizer": settings.has_optimizer,
    }
    try:
        with replaced_directory(target) as directory:
            if snapshot.masters:
                slot.base.policy.save(directory, snapshot.masters, slot.name)
                (directory / "README.md").unlink(missing_ok=True)
            write_atomically(directory / STATE_FILE, json.dumps(document, indent=1), durable=False)
            if snapshot.tensors:
                write_tensors(directory, snapshot.tensors)
            write_manifest(directory, settings.updates, settings.identity(), snapshot.counters)
    except OSError as error:
        raise CheckpointError(f"{target}: not written: {error}") from None


def load_state(slot: Slot, directory: Path, *, optimizer: bool) -> Manifest:
    """Continue from a state; a gradient so far is cleared.

    Args:
        slot: an adapter as the state's.
        directory: the state.
        optimizer: whether to take over the optimizer's state too; otherwise it begins anew.

    Returns:
        The state's manifest.

    Raises:
        CheckpointError: it is damaged, belongs to another base or adapter, or has no optimizer's state; the slot is as
            it was.
    """
    settings = StateSettings.read(directory)
    if settings.base != slot.base.digest:
        raise CheckpointError(f"{directory}: belongs to another base model ({settings.model})")
    if settings.identity() != identity_of(slot.base.digest, slot.lora):
        raise CheckpointError(
            f"{directory}: belongs to an adapter of other settings: {_difference(settings.lora, slot)}"
        )
    if not settings.has_optimizer:
        raise CheckpointError(f"{directory}: was saved for sampling; load one that save_state wrote")
    learner = slot.learner
    wanted = {name: torch.empty_like(tensor) for name, tensor in _named(slot).items()}
    wanted = wanted if optimizer else {name: each for name, each in wanted.items() if name.startswith(MASTER_PREFIX)}
    manifest = read_tensors(directory, settings.identity(), wanted, all_of_it=optimizer)
    learner.discard()
    own = _named(slot)
    with torch.no_grad():
        for name, tensor in wanted.items():
            own[name].copy_(tensor)
    if not optimizer:
        learner.optimizer.state.clear()
    learner.restore(updates=int(manifest.counters.get("updates", 0)) if optimizer else 0)
    return manifest


def slot_from(base: Base, directory: Path, *, optimizer: bool) -> tuple[Slot, Manifest]:
    """A new slot that continues from a state; see `load_state`."""
    slot = base.open(StateSettings.read(directory).lora, 0)
    try:
        return slot, load_state(slot, directory, optimizer=optimizer)
    except TrainerError:
        base.close(slot)
        raise


def state_counter(directory: Path, name: str) -> float | None:
    """A scalar of a saved state; None where there is no such state or scalar."""
    try:
        return Manifest.parse((directory / MANIFEST).read_bytes()).counters.get(name)
    except (OSError, ValueError):
        return None


def newest_state(root: Path) -> Path | None:
    """The newest valid state below a directory, by name; damaged ones are moved aside.

    Args:
        root: has states whose names sort by age.
    """
    if not root.is_dir():
        return None
    for directory in sorted((each for each in root.iterdir() if not each.name.startswith(".")), reverse=True):
        if ".broken" in directory.name:
            continue
        if state_problem(directory) is None:
            return directory
        broken = directory.with_name(f"{directory.name}.broken")
        shutil.rmtree(broken, ignore_errors=True)
        directory.rename(broken)
    return None


def _named(slot: Slot) -> dict[str, torch.Tensor]:
    """Tensors of the learner's state, under names that do not depend on the slot."""
    own, common = f".{slot.name}.", f".{RUN_ADAPTER}."
    return {name.replace(own, common): tensor for name, tensor in slot.learner.state_tensors().items()}


def _difference(theirs: LoraSettings, slot: Slot) -> str:
    ours: dict[str, Any] = slot.lora.model_dump()
    different = {name: value for name, value in theirs.model_dump().items() if ours[name] != value}
    return ", ".join(f"{name} {value!r} and not {ours[name]!r}" for name, value in different.items())
