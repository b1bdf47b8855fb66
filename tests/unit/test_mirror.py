"""The mirror returns complete checkpoints bit for bit, and nothing else."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import register_implementation
from mirrored import IDENTITY, files_under, save_step, saved_run, write_metrics

from trainer.checkpoints.mirror import Mirror, take_snapshot
from trainer.errors import MirrorAccessError, MirrorError, UserError
from trainer.files import replaced_directory
from trainer.run.directory import RunDir


class Flaky(LocalFileSystem):
    """The local disk behind a network on which each operation fails `failures` times before it succeeds."""

    protocol = "flaky"
    failures: ClassVar[int] = 0
    error: ClassVar[type[Exception]] = ConnectionResetError
    seen: ClassVar[dict[str, int]] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _fail(self, operation: str) -> None:
        self.seen[operation] = self.seen.get(operation, 0) + 1
        if self.seen[operation] <= self.failures:
            raise self.error("connection reset by peer")

    def ls(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        self._fail(f"ls {path}")
        return super().ls(path, *args, **kwargs)

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> Any:
        self._fail(f"put {rpath}")
        return super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath: Any, lpath: Any, *args: Any, **kwargs: Any) -> Any:
        self._fail(f"get {rpath}")
        return super().get_file(rpath, lpath, *args, **kwargs)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    register_implementation("flaky", Flaky, clobber=True)
    Flaky.seen.clear()
    yield Flaky
    Flaky.failures, Flaky.error = 0, ConnectionResetError


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/backup" if request.param == "file" else "memory://backup/deep"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def here(tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 2, 4 and 6."""
    return saved_run(tmp_path / "here", 6)


@pytest.fixture
def there(tmp_path: Path) -> RunDir:
    """The run directory on a fresh machine."""
    root = tmp_path / "there" / "small"
    root.mkdir(parents=True)
    return RunDir(root)


def mirror_of(run: RunDir, address: str, **options: Any) -> Mirror:
    return Mirror(address, run, options.pop("identity", IDENTITY), backoff_s=0.0, **options)


def pushed(run: RunDir, address: str, *steps: int, **options: Any) -> Mirror:
    mirror = mirror_of(run, address, **options)
    for step in steps:
        mirror.push(step)
    return mirror


def steps_at(mirror: Mirror) -> list[str]:
    return sorted(mirror.storage.names())


def test_what_was_pushed_is_fetched_bit_for_bit(here: RunDir, there: RunDir, address: str) -> None:
    here.excluded_file.write_text("[3]")
    pushed(here, address, 2, 4)
    assert mirror_of(there, address).fetch() == 4
    assert files_under(there.checkpoints) == {
        f"step-000004/{name}": content for name, content in files_under(here.checkpoint(4)).items()
    }
    assert there.read_metrics() == here.read_metrics()[:5], "steps 0 to 4 of 0 to 6"
    assert there.metrics_file.read_text() == "".join(here.metrics_file.read_text().splitlines(keepends=True)[:5])
    best = "adapter-best"
    assert files_under(there.root / best) == files_under(here.root / best)
    assert there.tracker_file.read_text() == here.tracker_file.read_text()
    assert there.excluded_file.read_text() == "[3]"
    assert {entry.name for entry in there.root.iterdir()} == {
        "checkpoints", "metrics.jsonl", best, "wandb.json", "excluded.json",
    }, "nothing half-done is left"  # fmt: skip


def test_a_run_without_evaluation_and_tracker_is_mirrored_too(here: RunDir, there: RunDir, address: str) -> None:
    shutil.rmtree(here.weights(is_lora=True, best=True))
    here.tracker_file.unlink()
    pushed(here, address, 2)
    assert mirror_of(there, address).fetch() == 2
    assert {entry.name for entry in there.root.iterdir()} == {"checkpoints", "metrics.jsonl"}


def test_nothing_is_fetched_beside_a_checkpoint_that_is_here(here: RunDir, there: RunDir, address: str) -> None:
    pushed(here, address, 2, 4)
    save_step(there, 1)
    before = files_under(there.root)
    assert mirror_of(there, address).fetch() is None
    assert files_under(there.root) == before


def test_an_empty_mirror_has_nothing(there: RunDir, address: str) -> None:
    assert mirror_of(there, address).fetch() is None
    assert files_under(there.root) == {}


def test_what_a_run_killed_before_its_first_save_left_is_replaced(here: RunDir, there: RunDir, address: str) -> None:
    write_metrics(there, 1, loss=9.0)
    there.excluded_file.write_text("[1, 2]")
    stale = there.weights(is_lora=True, best=True)
    stale.mkdir()
    (stale / "stale.bin").write_bytes(b"of the killed run")
    pushed(here, address, 2)
    assert mirror_of(there, address).fetch() == 2
    assert there.read_metrics() == here.read_metrics()[:3]
    assert not there.excluded_file.exists(), "the fetched run has excluded no rows"
    assert files_under(stale) == files_under(here.weights(is_lora=True, best=True))


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json", "run/metrics.jsonl"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_the_one_before_is_fetched_where_the_newest_is_damaged(
    here: RunDir, there: RunDir, tmp_path: Path, name: str, damage: str
) -> None:
    address = f"file://{tmp_path}/backup"
    pushed(here, address, 2, 4)
    file = tmp_path / "backup" / "small" / "step-000004" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + (b"" if damage == "cut" else b"?"))
    mirror = mirror_of(there, address)
    with pytest.warns(UserWarning, match=f"step-000004/{name}: .*; taking the one before"):
        assert mirror.fetch() == 2
    assert [path.name for path in there.checkpoints.iterdir()] == ["step-000002"]
    assert [record["step"] for record in there.read_metrics()] == [0, 1, 2]

    save_step(there, 4)  # the run continues from step 2 and reaches step 4 again
    write_metrics(there, 4)
    mirror.push(4)
    assert file.read_bytes() == content, "the damaged copy is replaced by a whole one"


def test_a_cut_off_upload_is_no_checkpoint(here: RunDir, there: RunDir, tmp_path: Path) -> None:
    """The machine dies before it writes the marker, or while it writes it."""
    address = f"file://{tmp_path}/backup"
    pushed(here, address, 2, 4, 6, keep_last=3)
    directory = tmp_path / "backup" / "small"
    (directory / "step-000006" / "complete.json").unlink()
    marker = directory / "step-000004" / "complete.json"
    marker.write_text(marker.read_text()[:200])
    assert mirror_of(there, address).fetch() == 2


def test_where_all_are_damaged_nothing_is_fetched(here: RunDir, there: RunDir, tmp_path: Path) -> None:
    address = f"file://{tmp_path}/backup"
    pushed(here, address, 2)
    write_metrics(there, 1, loss=9.0)
    before = files_under(there.root)
    (tmp_path / "backup" / "small" / "step-000002" / ".metadata").write_bytes(b"?")
    with pytest.warns(UserWarning, match="step-000002/.metadata: damaged"):
        assert mirror_of(there, address).fetch() is None
    assert files_under(there.root) == before


def test_another_run_of_the_same_name_is_neither_fetched_nor_touched(
    here: RunDir, there: RunDir, tmp_path: Path
) -> None:
    address = f"file://{tmp_path}/backup"
    pushed(here, address, 2)
    before = files_under(tmp_path / "backup")
    other = mirror_of(there, address, identity="b" * 64)
    assert other.fetch() is None
    save_step(there, 4, identity="b" * 64)
    write_metrics(there, 4)
    with pytest.raises(MirrorError, match=r"holds another run. Give this one another --name or another mirror"):
        other.push(4)
    assert files_under(tmp_path / "backup") == before


@pytest.mark.parametrize(
    "name", ["../escaped", "run/../../escaped", "/escaped", "run/plan.json", "run", "deep/file", "run//metrics.jsonl"]
)
def test_a_planted_marker_writes_nothing_elsewhere(here: RunDir, there: RunDir, tmp_path: Path, name: str) -> None:
    address = f"file://{tmp_path}/backup"
    pushed(here, address, 2)
    file = tmp_path / "backup" / "small" / "step-000002" / "complete.json"
    marker = json.loads(file.read_text())
    marker["files"] = {name: marker["files"].pop("__0_0.distcp")} | marker["files"]
    file.write_text(json.dumps(marker))
    with pytest.warns(UserWarning, match="has no place in a checkpoint|missing|damaged"):
        assert mirror_of(there, address).fetch() is None
    assert files_under(there.root) == {}
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(("keep_last", "kept"), [(1, ["6"]), (2, ["4", "6"]), (3, ["2", "4", "6"])])
def test_the_mirror_keeps_the_last_ones(here: RunDir, address: str, keep_last: int, kept: list[str]) -> None:
    mirror = pushed(here, address, 2, 4, 6, keep_last=keep_last)
    assert steps_at(mirror) == [f"step-00000{step}" for step in kept]


def test_a_cut_off_upload_is_cleared_away_and_does_not_count_as_kept(here: RunDir, tmp_path: Path) -> None:
    mirror = pushed(here, f"file://{tmp_path}/backup", 2, 4)
    (tmp_path / "backup" / "small" / "step-000004" / "complete.json").unlink()
    mirror.push(6)
    assert steps_at(mirror) == ["step-000002", "step-000006"]


def test_a_damaged_copy_does_not_count_as_kept(here: RunDir, there: RunDir, tmp_path: Path) -> None:
    pushed(here, f"file://{tmp_path}/backup", 2, 4)
    (tmp_path / "backup" / "small" / "step-000004" / ".metadata").write_bytes(b"?")
    mirror = mirror_of(there, f"file://{tmp_path}/backup")
    with pytest.warns(UserWarning, match="step-000004/.metadata: damaged"):
        assert mirror.fetch() == 2
    save_step(there, 6)
    mirror.push(6)
    assert steps_at(mirror) == ["step-000002", "step-000006"]


def test_newer_copies_survive_a_push_of_an_older_step(here: RunDir, tmp_path: Path) -> None:
    """A machine with an old local checkpoint resumes after another machine has made more steps."""
    mirror = pushed(here, f"file://{tmp_path}/backup", 4, 6)
    mirror.push(2)
    assert steps_at(mirror) == ["step-000002", "step-000004", "step-000006"]


def test_a_step_that_is_there_already_is_not_copied_again(here: RunDir, flaky: type[Flaky], tmp_path: Path) -> None:
    mirror = pushed(here, f"flaky://{tmp_path}/backup", 2)
    flaky.seen.clear()
    mirror.push(2)
    assert not [operation for operation in flaky.seen if operation.startswith("put")]


def test_an_operation_that_fails_twice_is_tried_again(
    here: RunDir, there: RunDir, flaky: type[Flaky], tmp_path: Path
) -> None:
    flaky.failures = 2
    pushed(here, f"flaky://{tmp_path}/backup", 2)
    assert mirror_of(there, f"flaky://{tmp_path}/backup").fetch() == 2
    assert files_under(there.checkpoint(2)) == files_under(here.checkpoint(2))
    uploads = [count for operation, count in flaky.seen.items() if operation.startswith("put")]
    assert set(uploads) == {3}, "each file failed twice and then succeeded"


def test_a_lasting_outage_leaves_the_older_copy_whole(
    here: RunDir, there: RunDir, flaky: type[Flaky], tmp_path: Path
) -> None:
    address = f"flaky://{tmp_path}/backup"
    pushed(here, address, 2)
    flaky.seen.clear()
    flaky.failures = 100
    with pytest.raises(MirrorError, match=r"backup/small: connection reset by peer \(tried 4 times\)"):
        mirror_of(here, address).push(4)
    with pytest.raises(MirrorError, match="tried 4 times"):
        mirror_of(there, address).fetch()
    flaky.failures = 0
    assert mirror_of(there, address).fetch() == 2
    assert not (here.root / ".mirror.tmp").exists()


def test_refused_access_is_said_at_once(here: RunDir, flaky: type[Flaky], tmp_path: Path) -> None:
    flaky.failures, flaky.error = 100, PermissionError
    with pytest.raises(MirrorAccessError, match=r"access refused: .* Check the credentials") as caught:
        pushed(here, f"flaky://{tmp_path}/backup", 2)
    assert caught.value.exit_code == 2
    assert set(flaky.seen.values()) == {1}, "no second try"


def test_a_checkpoint_that_is_gone_is_said(here: RunDir, address: str) -> None:
    with pytest.raises(MirrorError, match="step-000008: not copied"):
        mirror_of(here, address).push(8)


def test_better_weights_that_arrive_meanwhile_are_never_mixed_with_the_old(here: RunDir, tmp_path: Path) -> None:
    """One thread replaces adapter-best as the training does, while another takes snapshots as a push does."""
    target, ended = here.weights(is_lora=True, best=True), threading.Event()

    def replace() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with replaced_directory(target) as directory:
                for name in range(100):  # many, so that linking takes as long as the swap
                    (directory / str(name)).write_text(str(number))
            ended.wait(0.01)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        while not (target / "0").exists():
            ended.wait(0.01)
        found = []
        for _ in range(300):
            held = tmp_path / "held"
            take_snapshot(target, held)
            found.append(files_under(held))
            shutil.rmtree(held)
    finally:
        ended.set()
        thread.join()
    assert {len(set(copy.values())) for copy in found} == {1}, "each snapshot has the files of a single version"
    assert {len(copy) for copy in found} == {100}
    assert len({copy["0"] for copy in found}) > 1, "there were several versions"


def test_a_missing_package_is_named_with_its_remedy(there: RunDir) -> None:
    with pytest.raises(UserError, match=r"the package for oss:// is missing. Run: pip install ossfs"):
        mirror_of(there, "oss://bucket/prefix")


def test_an_unknown_protocol_is_refused(there: RunDir) -> None:
    with pytest.raises(UserError, match=r"checkpoint.mirror: s4://bucket/small: Protocol not known: s4"):
        mirror_of(there, "s4://bucket")
