"""Faults inside a worker, at named points of its file operations.

Python imports this at its start where the directory is on PYTHONPATH. It does nothing but in a process that runs
`trainer.worker` with CHAOS_STATE set: the directory that holds plan.json (see `Saboteur`) and takes events.jsonl, what
the worker did, and `fired-N`, by which a fault strikes once, whatever is restarted. CHAOS_OWNER is the process that a
power cut spares, and all above it.

The power cut. `Disk` keeps what the last fsyncs promised: of each file the size when it was last fsynced (0 if never),
of each directory the entries when it was last fsynced (none if never). What lay there as the worker started counts as
promised. At the cut this record is written to cut.json, the processes are killed, and `chaos_runs.apply_cut` makes the
run directory again from it. So all of these are lost: data of files beyond their fsync; files, directories, renames
and removals in a directory that was not fsynced after them. `torn` loses each of them by a coin instead, and lets a
file end anywhere between the two sizes. Hard links keep removed files' data and inode numbers; open handles those of
directories.

What it does not simulate: bytes overwritten in place (nothing here does that), sectors that come back damaged or as
zeros, an fsync that lies or fails, what supervisor and launcher write, and directories above the run's own.
"""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

STEP = r"step-\d{6}"
STAGING = rf"checkpoints/\.{STEP}\.tmp"
POINTS: dict[str, tuple[str, str, str]] = {
    # operation, path in the run directory (of a rename: where to), moment
    "shard written": ("fsync", rf"{STAGING}/__0_0\.distcp", "after"),
    "manifest half": ("fsync", rf"{STAGING}/\.manifest.*", "half"),
    "manifest renamed": ("rename", rf"{STAGING}/manifest\.json", "after"),
    "target removed": ("rmtree", rf"checkpoints/{STEP}", "after"),
    "before rename": ("rename", rf"checkpoints/{STEP}", "before"),
    "renamed": ("rename", rf"checkpoints/{STEP}", "after"),
    "committed": ("fsync", r"checkpoints", "after"),
    "metrics half": ("fsync", r"metrics\.jsonl", "half"),
    "metrics synced": ("fsync", r"metrics\.jsonl", "after"),
    "rewind half": ("fsync", r"\.metrics\.jsonl.*", "half"),
    "rewind renamed": ("rename", r"metrics\.jsonl", "after"),
    "chunk half": ("fsync", rf"rollouts/{STEP}/\.chunk.*", "half"),
    "chunk renamed": ("rename", rf"rollouts/{STEP}/chunk-\d+\.jsonl", "after"),
    "chunk synced": ("fsync", rf"rollouts/{STEP}", "after"),
    "best retired": ("rename", r"\.adapter-best\.old", "after"),
    "best renamed": ("rename", r"adapter-best", "after"),
    "excluded half": ("fsync", r"\.excluded\.json.*", "half"),
    "excluded renamed": ("rename", r"excluded\.json", "after"),
    "outcome half": ("fsync", r"\.outcome\.json.*", "half"),
    "outcome renamed": ("rename", r"outcome\.json", "after"),
    "anywhere": ("", r".*", "after"),
}
UNSYNCED = {  # mutants: whose fsync does nothing
    "metrics not fsynced": r"metrics\.jsonl",
    "checkpoint not fsynced before its rename": rf"{STAGING}(/.*)?",
    "directory not fsynced after the rename": r"checkpoints",
}
MUTANTS = [*UNSYNCED, "manifest trusted", "no fence"]


class Disk:
    """What a power cut would leave of a directory."""

    def __init__(self, root: Path, shadow: Path) -> None:
        """What lies there now is promised."""
        self.root, self.shadow = root, shadow
        self.sizes: dict[int, int] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self._handles: dict[int, int] = {}
        shadow.mkdir(parents=True, exist_ok=True)
        for place, _, files in os.walk(root):
            self.synced(Path(place))
            for file in files:
                with suppress(FileNotFoundError):
                    self.synced(Path(place, file))

    def synced(self, path: Path) -> None:
        """A file or directory was fsynced."""
        about = path.stat()
        if not path.is_dir():
            self._know(path, about.st_ino)
            self.sizes[about.st_ino] = about.st_size
            return
        self._know_directory(path, about.st_ino)
        found = self.entries[about.st_ino] = {}
        for entry in list(os.scandir(path)):
            with suppress(FileNotFoundError):  # gone meanwhile
                know = self._know_directory if entry.is_dir(follow_symlinks=False) else self._know
                know(Path(entry.path), entry.inode())
                found[entry.name] = entry.inode()

    def _know(self, file: Path, inode: int) -> None:
        if inode not in self.sizes:
            os.link(file, self.shadow / str(inode))
            self.sizes[inode] = 0

    def _know_directory(self, path: Path, inode: int) -> None:
        if inode not in self.entries:
            self._handles[inode] = os.open(path, os.O_RDONLY)
            self.entries[inode] = {}

    def record(self) -> dict[str, Any]:
        """For cut.json."""
        return {"root": self.root.stat().st_ino, "sizes": self.sizes, "entries": self.entries}


class Saboteur:
    """Carries out plan.json: {run, faults: [{point, nth, action}], mutant, is_flock_off}.

    The faults strike in their order, each when its point is reached for the nth time in one process. Actions: kill;
    cut and torn, the power cut; stop, until somebody sends SIGCONT; clock:SECONDS, from then on.
    """

    def __init__(self, state: Path) -> None:
        """Read the plan."""
        plan = json.loads((state / "plan.json").read_text())
        self.state, self.run = state, Path(plan["run"])
        self.faults: list[dict[str, Any]] = plan["faults"]
        self.mutant: str = plan["mutant"]
        self.is_flock_off: bool = plan["is_flock_off"]
        self.lock = threading.RLock()
        self.counts: Counter[int] = Counter()
        self.clock_s = 0.0
        self.fsync = os.fsync
        self.shadow = state / f"shadow-{os.getpid()}"
        has_cut = any(fault["action"] in ("cut", "torn") for fault in self.faults)
        self.disk = Disk(self.run, self.shadow) if has_cut else None
        self.note("start")

    def install(self) -> None:
        """Take the places of the functions of os and shutil."""
        os.fsync = self.on_fsync
        for module, name, argument in ((os, "rename", 1), (os, "replace", 1), (shutil, "rmtree", 0)):
            setattr(module, name, self.wrapped(name, getattr(module, name), argument))
        real_time = time.time
        time.time = lambda: real_time() + self.clock_s
        if self.is_flock_off:
            fcntl.flock = lambda *_: None
        if self.mutant == "no fence":
            from trainer.run.directory import RunDir

            RunDir.refuse_stale = lambda *_: None  # type: ignore[method-assign]
        if self.mutant == "manifest trusted":
            from trainer.checkpoints.local import Checkpoints
            from trainer.checkpoints.manifest import MANIFEST, Manifest

            Checkpoints._verified = lambda _self, directory, _tensors: Manifest.parse(  # type: ignore[method-assign]
                (directory / MANIFEST).read_text()
            )

    def wrapped(self, name: str, real: Any, argument: int) -> Any:
        """One of os and shutil, with our points around it."""
        operation = "rename" if name == "replace" else name

        def act(*arguments: Any, **named: Any) -> Any:
            place = arguments[argument] if len(arguments) > argument else None
            inside = self.inside(place) if isinstance(place, str | os.PathLike) else None
            if inside is None:
                return real(*arguments, **named)
            if operation == "rmtree":
                self.plant(inside)
            self.reached(operation, inside, "before")
            done = real(*arguments, **named)
            if operation == "rename" and inside == "metrics.jsonl":
                lines = (self.run / inside).read_text().splitlines()
                self.note("resumed", step=json.loads(lines[-1])["step"] if lines else -1)
            self.reached(operation, inside, "after")
            return done

        return act

    def plant(self, inside: str) -> None:
        """For "target removed": something lies where the checkpoint goes, as an attempt elsewhere may have left it."""
        staging = self.run / "checkpoints" / f".{Path(inside).name}.tmp"
        armed = self.armed()
        if armed is not None and armed["point"] == "target removed" and staging.is_dir():
            (self.run / inside).mkdir(exist_ok=True)

    def on_fsync(self, handle: Any) -> None:
        """In the place of os.fsync."""
        number = handle if isinstance(handle, int) else handle.fileno()
        path = Path(f"/proc/self/fd/{number}").readlink()
        inside = self.inside(path)
        if inside is None:
            self.fsync(number)
            return
        self.reached("fsync", inside, "before", number)
        with self.lock:
            if not (self.mutant in UNSYNCED and re.fullmatch(UNSYNCED[self.mutant], inside)):
                self.fsync(number)
                if self.disk is not None:
                    self.disk.synced(path)
            if inside == "checkpoints":
                steps = [int(entry.name[5:]) for entry in path.iterdir() if re.fullmatch(STEP, entry.name)]
                self.note("committed", step=max(steps, default=-1))
        self.reached("fsync", inside, "after")

    def inside(self, path: Any) -> str | None:
        """Where a path lies in the run directory."""
        whole = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links and touch the disk
        return str(whole.relative_to(self.run)) if whole.is_relative_to(self.run) else None

    def armed(self) -> dict[str, Any] | None:
        """The first fault that has not struck."""
        for number, fault in enumerate(self.faults):
            if not (self.state / f"fired-{number}").exists():
                return fault | {"number": number}
        return None

    def reached(self, operation: str, inside: str, moment: str, handle: int | None = None) -> None:
        """Something happens; strike if this is the place."""
        with self.lock:
            armed = self.armed()
            if armed is None:
                return
            wanted, pattern, when = POINTS[armed["point"]]
            is_here = wanted in ("", operation) and re.fullmatch(pattern, inside)
            if not is_here or moment != ("before" if when == "half" else when):
                return
            self.counts[armed["number"]] += 1
            if self.counts[armed["number"]] == armed["nth"]:
                if when == "half" and handle is not None:
                    os.ftruncate(handle, os.fstat(handle).st_size - 40)
                self.strike(armed, inside)

    def strike(self, fault: dict[str, Any], inside: str) -> None:
        """Carry out a fault."""
        (self.state / f"fired-{fault['number']}").touch()
        self.note("fault", number=fault["number"], at=inside)
        action = fault["action"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action.startswith("clock:"):
            self.clock_s = float(action.removeprefix("clock:"))
        else:
            assert self.disk is not None
            record = {"mode": action, "promised": self.disk.record(), "shadow": str(self.shadow)}
            record["present"] = Disk(self.run, self.shadow.with_name(f"{self.shadow.name}-present")).record()
            (self.state / "cut.json").write_text(json.dumps(record))
            for pid in [*above(os.getpid(), int(os.environ["CHAOS_OWNER"])), os.getpid()]:
                os.kill(pid, signal.SIGKILL)

    def note(self, event: str, **values: Any) -> None:
        """A line of events.jsonl."""
        line = json.dumps({"event": event, "pid": os.getpid(), **values}) + "\n"
        handle = os.open(self.state / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, line.encode())
        os.close(handle)


def above(pid: int, owner: int) -> list[int]:
    """Processes between one and its owner, highest first."""
    found: list[int] = []
    while (pid := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])) not in (owner, 1, 0):
        found.insert(0, pid)
    return found


def is_worker(argv: list[str]) -> bool:
    """Whether this Python runs the worker; a launcher has it further back in its arguments."""
    return "-m" in argv and argv[argv.index("-m") + 1] == "trainer.worker"


def chain() -> None:
    """Import the sitecustomize that ours hides."""
    here = Path(__file__).resolve().parent
    others = [place for place in sys.path if Path(place or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if "CHAOS_STATE" in os.environ and is_worker(sys.orig_argv):
    Saboteur(Path(os.environ["CHAOS_STATE"])).install()
if __name__ == "sitecustomize":
    chain()
