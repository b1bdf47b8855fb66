"""What a run's attempts printed, read once or followed while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from trainer.errors import LaunchError, QueueError
from trainer.jobs.state import observe
from trainer.run.directory import RunDir

POLL_S: Final = 0.5


def log_lines(
    run: RunDir, attempt: int | None = None, *, follow: bool = False, poll_s: float = POLL_S
) -> Iterator[str]:
    """Yield the lines of a log, without their ends.

    Args:
        run: any run.
        attempt: number of the process start; the newest one when None.
        follow: go on with new lines, and with the attempts that follow, until the run ends.
        poll_s: seconds between two looks at a log that is followed.

    Raises:
        LaunchError: the run has no such log.
    """
    files = _log_files(run)
    if attempt is not None and run.log_file(attempt) not in files:
        raise LaunchError(f"{run.log_file(attempt)}: does not exist; {_existing(run)}")
    if not files and not (follow and is_live(run)):
        raise LaunchError(f"{run.logs}: no log yet. Only runs that `trainer train` or `submit` started have logs")
    file = run.log_file(attempt) if attempt is not None else files[-1] if files else None
    if not follow:
        assert file is not None
        yield from file.read_text(encoding="utf-8", errors="replace").splitlines()
        return
    yield from _followed(run, file, poll_s)


def _followed(run: RunDir, file: Path | None, poll_s: float) -> Iterator[str]:
    position, rest = 0, b""
    while True:
        has_ended = not is_live(run)  # before the read: what is written later is read in the next round
        while file is not None:
            data = _bytes_from(file, position)
            position += len(data)
            *lines, rest = (rest + data).split(b"\n")
            yield from map(_text, lines)
            later = _following(run, file)
            if later is None:
                break
            if rest:
                yield _text(rest)
            file, position, rest = later, 0, b""
        if has_ended:
            if rest:
                yield _text(rest)
            return
        file = file or _following(run, None)
        time.sleep(poll_s)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _bytes_from(file: Path, position: int) -> bytes:
    """What the file has from a position on."""
    with file.open("rb") as opened:
        opened.seek(position)
        return opened.read()


def _following(run: RunDir, file: Path | None) -> Path | None:
    """The log after this one; the first one where there is none yet."""
    files = _log_files(run)
    if file is None:
        return files[0] if files else None
    index = files.index(file) if file in files else -1
    return files[index + 1] if index + 1 < len(files) else None


def _log_files(run: RunDir) -> list[Path]:
    """Logs of attempts, the oldest first; what the submitted process printed where no attempt has begun."""
    attempts = [run.log_file(number) for number in range(1, run.newest_attempt() + 1)]
    return [file for file in attempts if file.is_file()] or run.submission_logs()


def _existing(run: RunDir) -> str:
    names = [file.name for file in _log_files(run)]
    return f"there are {', '.join(names)}" if names else "the run has no logs"


def is_live(run: RunDir) -> bool:
    """Whether the run goes on by itself; True where Slurm does not answer, to ask again later."""
    try:
        return observe(run).is_live
    except QueueError:
        return True
