"""A run directory on a file system without flock: only EWOULDBLOCK means that a lock is held."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import FLOCK, preloaded

from trainer.run.owner import Owner

PROGRAM = """\
import subprocess, sys, json
from pathlib import Path
from trainer.errors import LaunchError
from trainer.run.directory import RunDir

run = RunDir(Path(sys.argv[1]))
if sys.argv[2:] == ["probe"]:
    print(json.dumps([run.is_locked(), run.is_supervised()]))
    raise SystemExit
probe = lambda: json.loads(subprocess.run([*sys.orig_argv, "probe"], capture_output=True, check=True).stdout)
said = [probe()]
with run.locked(), run.supervised():
    said.append(probe())
    try:
        with run.locked():
            pass
    except LaunchError as error:
        said.append(str(error))
said.append(probe())
print(json.dumps(said))
"""


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_locks_are_held_by_living_processes(tmp_path: Path, error: str) -> None:
    environment = preloaded(tmp_path, FLOCK, FLOCK_ERRNO=str(getattr(errno, error)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    before, held, refusal, after = json.loads(done.stdout)
    assert (before, held, after) == ([False, False], [True, True], [False, False])
    assert "another attempt is running" in refusal
    assert done.stderr.count("no working file locks") == 1


def test_a_lock_that_another_process_holds_is_held(tmp_path: Path) -> None:
    environment = preloaded(tmp_path, FLOCK, FLOCK_ERRNO=str(errno.EWOULDBLOCK))
    (tmp_path / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "probe"], env=environment, capture_output=True, check=True
    )
    assert json.loads(done.stdout)[0] is True


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of_process(child.pid)
    assert owner.is_alive()
    child.kill()
    child.communicate()
    assert not owner.is_alive()
    (tmp_path / "lock").write_text(owner.dump())
    assert Owner.read(tmp_path / "lock") == owner


def test_stray_files_in_the_fence_are_no_attempts(tmp_path: Path) -> None:
    from trainer.run.directory import RunDir

    run = RunDir(tmp_path)
    run.take_attempt({})
    for name in (".DS_Store", "000007~", ".nfs000000001"):
        (tmp_path / "fence" / name).touch()
    assert run.newest_attempt() == 1
    assert run.take_attempt({}) == 2
