"""A checkpoint that is being uploaded to a mirror, or waits for that, is not pruned: real files, a slow storage."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import register_implementation
from small_recipe import write_small

from trainer.checkpoints.local import Checkpoints, TrainState
from trainer.checkpoints.mirror import Mirror
from trainer.checkpoints.uploader import Uploader
from trainer.config.load import load_recipe
from trainer.distributed.world import World
from trainer.run.directory import RunDir

PATIENCE_S = 60.0


class Slow(LocalFileSystem):
    """The local disk behind a network on which an upload lasts until the test lets it go on."""

    protocol = "slow"
    has_begun: ClassVar[threading.Event] = threading.Event()
    may_end: ClassVar[threading.Event] = threading.Event()

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("slow://"))

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> Any:
        self.has_begun.set()
        assert self.may_end.wait(PATIENCE_S)
        return super().put_file(lpath, rpath, *args, **kwargs)


@pytest.fixture
def slow() -> Iterator[type[Slow]]:
    register_implementation("slow", Slow, clobber=True)
    Slow.has_begun.clear()
    Slow.may_end.clear()
    yield Slow
    Slow.may_end.set()


def test_steps_held_for_the_mirror_are_kept_until_they_are_uploaded(
    slow: type[Slow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    warnings: list[str] = []
    backup = tmp_path / "backup"
    uploader = Uploader(lambda: Mirror(f"slow://{backup}", run, "ours", keep_last=9, backoff_s=0.0), warnings.append)
    uploader.fetch()
    recipe = load_recipe(write_small(tmp_path), ["keep_last=1"]).recipe
    checkpoints = Checkpoints(run, recipe, "ours", World(0, 1, torch.device("cpu")), 0, uploader)

    save(checkpoints, 2)
    assert slow.has_begun.wait(PATIENCE_S)
    for step in (4, 6, 8):
        save(checkpoints, step)
    assert uploader.held() == {2, 8}, "step 2 is being uploaded, and step 8 has replaced 4 and 6, which waited"
    assert checkpoints.steps() == [2, 8], "keep_last is 1"

    slow.may_end.set()
    uploader.close(PATIENCE_S)
    assert warnings == []
    assert sorted(path.parent.name for path in backup.rglob("complete.json")) == ["step-000002", "step-000008"]
    save(checkpoints, 10)
    assert checkpoints.steps() == [10], "nothing older is held"


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.begin(TrainState(step), {"masters/a": torch.full((8, 8), float(step))})
    saved = checkpoints.collect(wait=True)
    assert saved is not None
    assert saved.problem is None
