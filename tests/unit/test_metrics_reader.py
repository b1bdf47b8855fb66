"""Reading metrics.jsonl while it grows, is rewound and is damaged; costs are counted in bytes read, never in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from trainer.files import write_atomically
from trainer.run.directory import RunDir
from trainer.run.metrics_reader import MetricsReader, newest_records, read_records

T = TypeVar("T")
NUM_LONG: Final = 200_000
POLL_BYTES: Final = 2**16
"""More than any poll below needs; the long file has 14 million."""
COUNTING_BYTES: Final = 200
"""What reading the count itself needs."""


def line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, "train/loss": 1 / (step + 1), **values}) + "\n"


def append(file: Path, text: str | bytes) -> None:
    with file.open("ab") as opened:
        opened.write(text if isinstance(text, bytes) else text.encode())


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


def bytes_read(act: Callable[[], T]) -> tuple[T, int]:
    """What an action returns, and how many bytes this process read from files meanwhile."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    result = act()
    return result, count() - before


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture(scope="module")
def long_text() -> str:
    return "".join(map(line, range(NUM_LONG)))


def test_each_record_is_returned_once(file):
    reader = MetricsReader(file)
    assert reader.poll() == [], "before there is a file"
    append(file, line(0) + line(1))
    assert steps(reader.poll()) == [0, 1]
    assert reader.poll() == []
    append(file, line(2))
    assert reader.poll() == [{"step": 2, "train/loss": 1 / 3}]


def test_reader_begins_at_the_end_or_with_the_newest_records(file):
    append(file, "".join(map(line, range(50))))
    assert MetricsReader(file).poll() == []
    assert steps(MetricsReader(file, last=3).poll()) == [47, 48, 49]
    assert steps(MetricsReader(file, last=99).poll()) == list(range(50))


def test_half_written_line_is_returned_when_it_is_whole(file):
    reader, text = MetricsReader(file), line(1, note="é")
    append(file, line(0) + text[:9])
    assert steps(reader.poll()) == [0]
    append(file, text[9:-1])
    assert reader.poll() == []
    append(file, "\n" + line(2))
    assert steps(reader.poll()) == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 700 + b"\n",  # a block that a power cut left unwritten
        b'{"step": 3, "train/lo\n',
        b"\xff\xfe broken\n",
        b"\n",
        b"[1, 2]\n",
        b'{"loss": 1.0}\n',
        b'{"step": "three"}\n',
    ],
)
def test_damaged_line_is_left_out(file, damage):
    reader = MetricsReader(file)
    append(file, line(0).encode() + damage + line(4).encode())
    assert steps(reader.poll()) == steps(read_records(file)) == [0, 4]
    assert steps(newest_records(file, 2)) == [0, 4]
    append(file, damage)
    assert reader.poll() == []
    assert RunDir(file.parent).newest_logged_step() == 4


def test_record_behind_unwritten_blocks_is_found(file):
    append(file, b"\0" * 4096 + line(7).encode())
    assert steps(read_records(file)) == [7]


def test_run_that_goes_back_to_its_checkpoint_is_followed(file):
    """As MetricsLog.rewind does: another file in its place, which ends at the checkpoint."""
    reader = MetricsReader(file)
    append(file, "".join(map(line, range(11))))
    assert steps(reader.poll()) == list(range(11))
    write_atomically(file, "".join(map(line, range(5))))
    assert reader.poll() == []
    append(file, line(5) + line(6))
    assert steps(reader.poll()) == [5, 6]
    write_atomically(file, "")
    assert reader.poll() == []
    append(file, line(0))
    assert steps(reader.poll()) == [0]


def test_steps_that_were_shown_before_a_rewind_are_not_shown_again(file):
    """The run went back to step 4 and passed step 10 between two polls."""
    reader = MetricsReader(file)
    append(file, "".join(map(line, range(11))))
    reader.poll()
    write_atomically(file, "".join(line(step, again=step > 4) for step in range(14)))
    assert steps(reader.poll()) == [11, 12, 13]


def test_rewind_that_drops_nothing_changes_nothing(file):
    """Every resume replaces the file, mostly by an equal one."""
    reader, text = MetricsReader(file), "".join(map(line, range(11)))
    append(file, text)
    reader.poll()
    write_atomically(file, text + line(11))
    assert steps(reader.poll()) == [11]


def test_file_cut_in_place_is_followed(file):
    reader = MetricsReader(file)
    append(file, "".join(map(line, range(11))))
    reader.poll()
    file.write_text(line(0) + line(1) + line(2))
    assert reader.poll() == []
    append(file, line(3))
    assert steps(reader.poll()) == [3]


def test_file_rewritten_in_place_and_longer_is_noticed(file):
    reader = MetricsReader(file)
    append(file, line(0) + line(1))
    reader.poll()
    file.write_text("".join(line(step, other="x" * 40) for step in range(4)))
    assert steps(reader.poll()) == [2, 3]


def test_record_of_100_kb(file):
    rows = [f"train.jsonl:{number}" for number in range(7000)]
    append(file, line(0) + line(1, rows=rows))
    assert file.stat().st_size > 100_000
    run = RunDir(file.parent)
    assert run.newest_record() == {"step": 1, "train/loss": 0.5, "rows": rows}
    assert steps(run.newest_records(5)) == [0, 1]
    reader = run.metrics_reader()
    append(file, line(2, rows=rows) + line(3))
    assert steps(reader.poll()) == [2, 3]
    append(file, line(4, rows=rows)[:-1])
    assert run.newest_logged_step() == 3, "the newest is half-written"
    assert reader.poll() == []
    assert bytes_read(reader.poll)[1] < COUNTING_BYTES, "its first half is not read again at each poll"
    append(file, "\n")
    assert steps(reader.poll()) == [4]


def test_newest_records_of_an_empty_or_missing_file(file):
    assert newest_records(file, 3) == []
    file.touch()
    assert newest_records(file, 3) == []
    append(file, '{"step": 0')
    assert newest_records(file, 3) == []


def test_poll_costs_the_same_in_a_long_run(file, long_text):
    file.write_text(long_text)
    reader, read = bytes_read(lambda: MetricsReader(file, last=20))
    assert read < POLL_BYTES
    assert steps(reader.poll())[-1] == NUM_LONG - 1
    assert bytes_read(reader.poll)[1] < COUNTING_BYTES, "nothing is new, so nothing of the file is read"
    append(file, line(NUM_LONG))
    records, read = bytes_read(reader.poll)
    assert steps(records) == [NUM_LONG]
    assert read < 2000
    write_atomically(file, long_text + line(NUM_LONG))  # a resume
    records, read = bytes_read(reader.poll)
    assert (records, read < POLL_BYTES) == ([], True)


def test_newest_record_of_a_long_run_is_read_from_its_end(file, long_text):
    file.write_text(long_text)
    run = RunDir(file.parent)
    step, read = bytes_read(run.newest_logged_step)
    assert step == NUM_LONG - 1
    assert read < POLL_BYTES
