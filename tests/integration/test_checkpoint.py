"""Checkpoints that are damaged, malicious, of another run, or too many: real torch DCP files, in process."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from trainer.checkpoints.local import Checkpoints, Saved, TrainState
from trainer.config.recipe import SFTRecipe
from trainer.distributed.world import World
from trainer.errors import CheckpointError
from trainer.files import file_sha256
from trainer.run.directory import RunDir

ONE_RANK = World(0, 1, torch.device("cpu"))


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"masters/a": torch.full((64, 8), value), "optimizer/a/exp_avg": torch.full((64, 8), -value)}


def open_checkpoints(root: Path, *, identity: str = "ours", attempt: int = 0, **settings: Any) -> Checkpoints:
    sections = {"name": "x", "method": "sft", "model": {"path": "m"}, "data": {"train": "t"}, "steps": 10}
    recipe = SFTRecipe.model_validate(sections | settings)
    return Checkpoints(RunDir(root), recipe, identity, ONE_RANK, attempt)


def save(
    checkpoints: Checkpoints, state: TrainState, values: dict[str, torch.Tensor], keep: int | None = None
) -> Saved:
    """Begin a save and wait for it."""
    checkpoints.begin(state, values, keep)
    done = checkpoints.collect(wait=True)
    assert done is not None
    return done


def saved(root: Path, *steps: int, **settings: Any) -> Checkpoints:
    """Checkpoints of some steps; tensors hold the step's number."""
    checkpoints = open_checkpoints(root, **settings)
    for step in steps:
        assert save(checkpoints, TrainState(step, {"updates": step}), tensors(step)).problem is None
    return checkpoints


def sign_again(directory: Path) -> None:
    """Make the manifest match the files as they are now, as an attacker would."""
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    for name, about in manifest["files"].items():
        about |= {"bytes": (directory / name).stat().st_size, "sha256": file_sha256(directory / name)}
    file.write_text(json.dumps(manifest))


def flip_a_byte(directory: Path) -> None:
    shard = directory / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def truncate(directory: Path) -> None:
    shard = directory / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)


def remove_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def remove_shard(directory: Path) -> None:
    (directory / "__0_0.distcp").unlink()


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def write_half_a_manifest(directory: Path) -> None:
    file = directory / "manifest.json"
    file.write_text(file.read_text()[:100])


def make_manifest_a_list(directory: Path) -> None:
    (directory / "manifest.json").write_text("[]")


def list_files_without_hashes(directory: Path) -> None:
    file = directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"files": [".metadata"]}))


def belong_to_another_plan(directory: Path) -> None:
    file = directory / "manifest.json"
    file.write_text(file.read_text().replace('"ours"', '"theirs"'))


def hold_other_tensors(directory: Path) -> None:
    other = open_checkpoints(directory.parent.parent / "other")
    save(other, TrainState(4), {"masters/b": torch.zeros(3)})
    shutil.rmtree(directory)
    other.run.checkpoint(4).rename(directory)


def hold_garbage_metadata(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"\x80\x04K\x01.")  # a pickle of the number 1
    sign_again(directory)


DAMAGES = (
    flip_a_byte, truncate, remove_manifest, remove_shard, empty, write_half_a_manifest, make_manifest_a_list,
    list_files_without_hashes, belong_to_another_plan, hold_other_tensors, hold_garbage_metadata,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_broken_newest_is_put_aside_and_the_one_before_is_taken(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    checkpoints = saved(tmp_path, 2, 4)
    damage(tmp_path / "checkpoints" / "step-000004")
    target = tensors(0)
    with pytest.warns(UserWarning, match=r"moved to step-000004\.broken-1, taking the one before"):
        state = checkpoints.load_newest(target)
    assert state == TrainState(2, {"updates": 2})
    assert torch.equal(target["masters/a"], torch.full((64, 8), 2.0))
    assert torch.equal(target["optimizer/a/exp_avg"], torch.full((64, 8), -2.0))
    assert checkpoints.steps() == [2]
    assert (tmp_path / "checkpoints" / "step-000004.broken-1").is_dir(), "renamed, not deleted"


def test_undamaged_newest_is_taken(tmp_path: Path) -> None:
    target = tensors(0)
    assert saved(tmp_path, 2, 4).load_newest(target) == TrainState(4, {"updates": 4})
    assert torch.equal(target["masters/a"], torch.full((64, 8), 4.0))


def test_no_valid_checkpoint_is_the_beginning(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)
    flip_a_byte(tmp_path / "checkpoints" / "step-000002")
    target = tensors(7)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.load_newest(target) is None
    assert torch.equal(target["masters/a"], torch.full((64, 8), 7.0)), "nothing was loaded"


def test_half_written_directory_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)
    half = tmp_path / "checkpoints" / ".step-000004.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    assert checkpoints.load_newest(tensors(0)) == TrainState(2, {"updates": 2})
    assert not half.exists()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.trace}",)


def test_malicious_metadata_runs_nothing(tmp_path: Path) -> None:
    """The manifest matches the planted pickle, so no hash reveals it."""
    checkpoints = saved(tmp_path, 2, 4)
    trace = tmp_path / "trace"
    newest = tmp_path / "checkpoints" / "step-000004"
    (newest / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    sign_again(newest)
    with pytest.warns(UserWarning, match="system has no place in a checkpoint"):
        state = checkpoints.load_newest(tensors(0))
    assert state == TrainState(2, {"updates": 2})
    assert not trace.exists()


def test_malicious_shard_runs_nothing(tmp_path: Path) -> None:
    """A shard that is a `torch.save` pickle, with metadata and a manifest that match it."""
    checkpoints = saved(tmp_path, 4)
    trace = tmp_path / "trace"
    newest = tmp_path / "checkpoints" / "step-000004"
    metadata = checkpoints_metadata(newest)
    evil = tmp_path / "evil.pt"
    torch.save(Evil(trace), evil)
    for info in metadata.values():
        info.offset, info.length = 0, evil.stat().st_size
    shard = newest / "__0_0.distcp"
    shard.write_bytes(evil.read_bytes())
    whole = pickle.loads((newest / ".metadata").read_bytes())
    whole.storage_data = metadata
    (newest / ".metadata").write_bytes(pickle.dumps(whole))
    sign_again(newest)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load_newest(tensors(0))
    assert not trace.exists()


def checkpoints_metadata(directory: Path) -> dict[object, Any]:
    return dict(pickle.loads((directory / ".metadata").read_bytes()).storage_data)


def test_bytes_are_refused(tmp_path: Path) -> None:
    """DCP stores values that are no tensors as pickles."""
    checkpoints = saved(tmp_path, 2, 4)
    newest = tmp_path / "checkpoints" / "step-000004"
    shutil.copy(newest / "manifest.json", tmp_path)
    shutil.rmtree(newest)
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        state_dict_saver.save(tensors(4) | {"extra": "text"}, storage_writer=FileSystemWriter(newest))
    shutil.copy(tmp_path / "manifest.json", newest)
    sign_again(newest)
    with pytest.warns(UserWarning, match="BytesStorageMetadata has no place"):
        assert checkpoints.load_newest(tensors(0)) == TrainState(2, {"updates": 2})


def test_keep_last_bounds_the_disk(tmp_path: Path) -> None:
    assert saved(tmp_path, 2, 4, 6, 8, keep_last=2).steps() == [6, 8]


def test_keep_every_keeps_milestones_beside_the_last(tmp_path: Path) -> None:
    assert saved(tmp_path, 2, 4, 6, 8, 10, keep_last=1, keep_every=4).steps() == [4, 8, 10]


def test_step_behind_the_best_weights_is_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, 4, keep_last=2)
    for step in (6, 8):
        save(checkpoints, TrainState(step), tensors(step), keep=2)
    assert checkpoints.steps() == [2, 6, 8]


def test_only_checkpoint_stays_when_the_next_save_fails(tmp_path: Path) -> None:
    """A file has the name of the staging directory, so nothing can be written; permissions would not stop root."""
    checkpoints = saved(tmp_path, 2, keep_last=1)
    (tmp_path / "checkpoints" / ".step-000004.tmp").write_text("in the way")
    assert "step-000004: not written: " in str(save(checkpoints, TrainState(4), tensors(4)).problem)
    assert checkpoints.steps() == [2]
    assert checkpoints.load_newest(tensors(0)) == TrainState(2, {"updates": 2})


def test_stale_attempt_commits_nothing(tmp_path: Path) -> None:
    """An attempt that was frozen continues after another one has taken over."""
    run = RunDir(tmp_path)
    old = open_checkpoints(tmp_path, attempt=run.take_attempt({}))
    save(old, TrainState(2), tensors(2))
    run.take_attempt({})
    assert "attempt 2 has taken over; attempt 1 stops" in str(save(old, TrainState(4), tensors(4)).problem)
    assert old.steps() == [2]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The state at `begin` is saved; the tensors may change right after it."""
    checkpoints = open_checkpoints(tmp_path)
    values = tensors(2)
    checkpoints.begin(TrainState(2), values)
    for tensor in values.values():
        tensor.fill_(9)
    assert checkpoints.collect(wait=True) is not None
    assert checkpoints.collect(wait=True) is None, "collected once"
    target = tensors(0)
    assert checkpoints.load_newest(target) == TrainState(2)
    assert torch.equal(target["masters/a"], torch.full((64, 8), 2.0))
