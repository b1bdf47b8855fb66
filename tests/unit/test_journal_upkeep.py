"""Old steps of the journal are compressed and removed, and nothing that a resume needs is lost."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.run.directory import RunDir
from trainer.run.journal import ChunkHeader, count_sampled, note_begun, read_chunk, read_step, set_aside, write_chunk
from trainer.run.journal_upkeep import JournalUpkeep, tidy_journal
from trainer.types import Group, Rollout, Row

ROW = Row({"prompt": "?"}, "rows.jsonl", 1, 0)


def header(step: int) -> ChunkHeader:
    return ChunkHeader(step=step, rows=(0,), group_size=1, world_size=1, length=(9, None))


def group(step: int) -> Group:
    return Group(ROW, (Rollout((1, 2, 3), (False, True, True), (-0.5, -1.5), "stop", step, f"text of {step}", 1.0),))


def write_steps(run: RunDir, steps) -> None:
    for step in steps:
        for number in (0, 1):
            note_begun(run, step, number)
            write_chunk(run, number, header(step), [group(step)])


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    write_steps(run, range(6))
    return run


def names(run: RunDir, step: int) -> list[str]:
    return sorted(file.name for file in run.journal(step).iterdir())


PLAIN, COMPRESSED = ["chunk-0000.jsonl", "chunk-0001.jsonl"], ["chunk-0000.jsonl.gz", "chunk-0001.jsonl.gz"]


def test_steps_below_the_checkpoint_are_compressed_and_read_as_before(run):
    before = [read_step(run, step) for step in range(6)]
    tidy_journal(run, 4, None)
    assert [names(run, step) for step in range(6)] == [COMPRESSED] * 4 + [PLAIN] * 2
    assert [read_step(run, step) for step in range(6)] == before
    assert read_chunk(run, 1, header(2), [ROW]) == [group(2)]  # a resume from an older checkpoint replays it
    assert len(run.journal_chunks(2)) == 2
    assert count_sampled(run) == (24, 0)


def test_only_steps_that_no_resume_needs_are_removed(run):
    tidy_journal(run, 3, keep_steps=1)
    assert run.journal_steps() == [3, 4, 5]  # 3 and 4 are older than the newest one, and a resume replays them
    tidy_journal(run, 6, keep_steps=2)
    assert run.journal_steps() == [4, 5]
    assert count_sampled(run) == (24, 0)  # what was removed is still counted


def test_refused_steps_follow_the_same_rule(run):
    set_aside(run, 1)
    set_aside(run, 4)
    tidy_journal(run, 5, keep_steps=3)
    assert (run.journal_steps(), run.journal_steps(refused=True)) == ([3, 5], [4])


def test_a_chunk_written_again_counts_before_its_compressed_past(run):
    tidy_journal(run, 6, None)
    write_chunk(run, 0, header(2), [Group(ROW, (Rollout((9,), (True,), (-1.0,), "stop", 2, "again", 0.0),))])
    assert [each.rollouts[0]["text"] for each in read_step(run, 2)] == ["again", "text of 2"]
    tidy_journal(run, 6, None)
    assert names(run, 2) == COMPRESSED
    assert [each.rollouts[0]["text"] for each in read_step(run, 2)] == ["again", "text of 2"]


def test_a_compressed_chunk_cut_anywhere_is_no_chunk(run):
    tidy_journal(run, 6, None)
    file = run.journal_chunks(2)[0]
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert read_chunk(run, 0, header(2), [ROW]) is None, length
    file.write_bytes(whole)
    assert read_chunk(run, 0, header(2), [ROW]) == [group(2)]


CHILD = """
import os, signal, sys
from pathlib import Path
from trainer.run.directory import RunDir
from trainer.run.journal_upkeep import tidy_journal

def strike(at):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[1] and "w" in str(arguments[1])
        changes = writes or event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if changes and "rollouts" in str(arguments[0]):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
    return hook

for at, root in enumerate(sys.argv[2:], start=1):
    child = os.fork()
    if child == 0:
        sys.addaudithook(strike(at))
        tidy_journal(RunDir(Path(root)), 2, int(sys.argv[1]) or None)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
NUM_CHANGES = 40
"""More than any of the calls below makes, so that the last ones are not struck."""


@pytest.mark.parametrize("keep_steps", [0, 2])
def test_a_kill_at_any_change_of_the_disk_loses_nothing(tmp_path, keep_steps):
    runs = [RunDir(tmp_path / f"{at:02}") for at in range(NUM_CHANGES)]
    for run in runs:
        write_steps(run, range(3))
    argv = [sys.executable, "-c", CHILD, str(keep_steps), *(str(run.root) for run in runs)]
    done = subprocess.run(
        argv, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    codes = [int(line) for line in done.stdout.split()]
    assert set(codes) == {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) > 5
    kept = [1, 2] if keep_steps else [0, 1, 2]
    for at, run in enumerate(runs, start=1):
        for step in kept:
            assert read_chunk(run, 0, header(step), [ROW]) == [group(step)], (at, step)
            assert read_chunk(run, 1, header(step), [ROW]) == [group(step)], (at, step)
        if 0 in run.journal_steps():  # not half removed
            assert len(read_step(run, 0)) == 2
        assert count_sampled(run) == (12, 0), at
        tidy_journal(run, 2, keep_steps or None)  # the next attempt
        assert run.journal_steps() == kept
        assert [names(run, step) for step in kept] == [COMPRESSED] * (len(kept) - 1) + [PLAIN]
        left = {path.name for path in run.rollouts.iterdir()} - {f"step-{step:06d}" for step in kept}
        assert left == {"begun.jsonl"}


def checkpoint(run: RunDir, step: int) -> None:
    run.checkpoint(step).mkdir(parents=True)


def test_a_run_falls_back_to_its_second_newest_checkpoint_and_keeps_what_that_needs(run):
    upkeep = JournalUpkeep(run, 2, 1, say=lambda text: pytest.fail(text))
    checkpoint(run, 2)
    upkeep.begin()  # were it damaged, a resume would begin anew
    checkpoint(run, 4)
    upkeep.begin()
    upkeep._thread.shutdown(wait=True)
    assert run.journal_steps() == [2, 3, 4, 5]
    upkeep.close()


def test_what_cannot_be_tidied_is_said_and_stays(run):
    said: list[str] = []
    upkeep = JournalUpkeep(run, 1, None, said.append)
    checkpoint(run, 3)
    (run.journal(0) / "chunk-0000.jsonl.gz").mkdir()  # nothing can be renamed to it
    upkeep.begin()
    upkeep._thread.shutdown(wait=True)
    upkeep.close()
    assert said[0].startswith("warning: the journal was not tidied: ")
    assert len(read_step(run, 0)) == 2


def test_other_ranks_touch_nothing(run):
    upkeep = JournalUpkeep(run, None, 1, say=print)
    checkpoint(run, 6)
    upkeep.begin()
    upkeep.close()
    assert run.journal_steps() == list(range(6))


def test_compressed_bytes_do_not_depend_on_the_time(tmp_path):
    for name in ("a", "b"):
        write_steps(RunDir(tmp_path / name), [0])
        tidy_journal(RunDir(tmp_path / name), 1, None)
    first, second = (Path(tmp_path / name, "rollouts/step-000000/chunk-0000.jsonl.gz").read_bytes() for name in "ab")
    assert first == second
    assert gzip.decompress(first).startswith(b'{"format": 3, ')
