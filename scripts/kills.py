"""Kill real runs at random moments: supervisor, launcher, worker or all, with SIGKILL or SIGTERM.

Unlike the named faults of chaos.py, these are `trainer train` commands with all of their processes, on one rank and on
two. A command that was ended is given again. Every run must equal one that was never disturbed, to the bit.

Runs of the kind `turns` have an environment; there an environment's process, and the one that forks them, are killed
too, within a turn. Such a kill ends no command: the environment is played again.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import chaos_runs
import psutil
from chaos_runs import RECOVERY, differences, poison
from project import BIN, Project, Run, Running, wait_for

from trainer.run.directory import RunDir

TARGETS: Final = ("all processes", "supervisor", "launcher", "worker", "rank 1")
OF_TURNS: Final = ("environment", "environment", "zygote", "worker", "all processes")
"""Targets of runs with an environment; `zygote` is the process that forks them."""
SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM)
PHASES: Final = {
    "sft": ("saving", "evaluating", "training"),
    "rft": ("saving", "sampling", "evaluating", "training"),
    "turns": ("in a turn",),
}
MAX_KILLS: Final = 5
"""Of one run."""
POLL_S: Final = 0.002
PATIENCE_S: Final = 1.0
"""How long a phase is awaited from the step of its kill on; then the kill comes in whatever phase there is."""
KINDS: Final = ("sft", "rft", "sft on 2 ranks", "rft on 2 ranks", "turns")
EVAL_INTERVAL: Final = 4
RECIPE: Final[dict[str, Any]] = {"recovery": RECOVERY, "dcp_save_interval": 2, "eval_interval": EVAL_INTERVAL}
SFT: Final = RECIPE | {"steps": 60, "model__path": "poisoned", "data__train": "poisoned.jsonl", "lora__dropout": 0.1}
"""Two rows break the loss, so that the run returns once to its checkpoint and leaves them out."""
RFT: Final = RECIPE | {
    "method": "rft",
    "steps": 16,
    "data": {"train": "prompts.jsonl", "eval": "held_out.jsonl", "max_seq_tokens": 128},
    "rows_per_step": 4,
    "algorithm": {"minibatches_per_step": 2},
    "rewards": [{"use": "length.py:score"}],
    "rollout": {"group_size": 4, "max_completion_tokens": 10, "chunk_prompts": 1, "eval_samples": 8},
}
"""A step that ends with an evaluation spends most of its time in it, and so in sft."""
TURNS: Final = RFT | {
    "data": {"train": "asks.jsonl", "eval": "held_asks.jsonl", "max_seq_tokens": 128},
    "rewards": [],
    "rollout": {
        "group_size": 4,
        "max_completion_tokens": 10,
        "chunk_prompts": 2,
        "stop": ["a", "e", "i", "o", "n", "s", " "],
        "environment": "guessing.py:Echo",
        "deterministic": True,
        "eval_samples": 2,
    },
}
"""One to three turns; a random model soon draws a letter that ends one."""
RECIPES: Final = {"sft": SFT, "rft": RFT, "turns": TURNS}
REWARD: Final = "def score(completion, row):\n    return len(completion) % 7 / 7\n"
TWO_RANKS: Final = """\
{name: cpu2, device: cpu, device_name: CPU, gpus: 2, gpu_memory_gib: 16, micro_batch_tokens: 256, accelerate: cpu,
 limits: {lora: {max_params_b: 1, max_seq_tokens: 4096, basis: estimated}}}
"""


@dataclass(frozen=True)
class Kill:
    """What is signalled, and when."""

    target: str
    signal: signal.Signals
    phase: str
    step: int
    """The earliest step."""

    def __str__(self) -> str:
        return f"{self.signal.name} to {self.target} while {self.phase}"


@dataclass
class Killed:
    """How a run that was killed ended."""

    kind: str
    kills: list[Kill] = field(default_factory=list)
    """Those that struck."""
    problems: list[str] = field(default_factory=list)


class Harness:
    """A project whose runs are killed, and its undisturbed runs."""

    def __init__(self, project: Project) -> None:
        """Write recipes, rows, the reward and the shape of two ranks."""
        self.project = project
        poison(project.root)
        (project.root / "length.py").write_text(REWARD)
        shutil.copy(Path(chaos_runs.__file__).with_name("guessing.py"), project.root)
        asks = [json.dumps({"ask": f"what is {number}?"}) + "\n" for number in range(12)]
        (project.root / "asks.jsonl").write_text("".join(asks[:8]))
        (project.root / "held_asks.jsonl").write_text("".join(asks[8:]))
        (project.root / "cpu2.yaml").write_text(TWO_RANKS)
        for kind in KINDS:
            shape = "cpu2.yaml" if kind.endswith("2 ranks") else "cpu"
            project.recipe(_file(kind), name=_name(kind), shape=shape, **RECIPES[kind.split()[0]])
        self.whole: dict[str, Run] = {}

    def undisturbed(self, kind: str) -> Run:
        """The run without kills."""
        if kind not in self.whole:
            name = f"{_name(kind)}-whole"
            done = self.start(kind, name).wait()
            assert done.code == 0, done.said
            self.whole[kind] = self.project.run(name)
        return self.whole[kind]

    def start(self, kind: str, name: str) -> Running:
        """`trainer train` of a run, new or not."""
        return self.project.start([str(BIN / "trainer"), "train", _file(kind), "--name", name])

    def survive(self, kind: str, number: int, draw: random.Random, most: int) -> Killed:
        """One run with at most `most` kills, started again until it ends, and compared with the undisturbed one."""
        whole, name = self.undisturbed(kind), f"{_name(kind)}-{number}"
        killed, run = Killed(kind), RunDir(self.project.run(name).root)
        running = self.start(kind, name)
        for kill in planned(kind, draw, min(MAX_KILLS, most)):
            while (
                (phase := _await(run, kill, running, draw)) is None and not run.is_finished(1) and not killed.problems
            ):
                running = self._again(kind, name, running, killed)
            if phase is None:
                print(f"  {name}: ended before step {kill.step}", flush=True)
                break
            if self._strike(kill, running):
                killed.kills.append(replace(kill, phase=phase))
                print(f"  {name}: {killed.kills[-1]}, step {run.newest_logged_step()}", flush=True)
        running.wait()
        while not run.is_finished(1) and not killed.problems:
            running = self._again(kind, name, running, killed)
            running.wait()
        killed.problems += differences(self.project.run(name), whole)
        with suppress(AssertionError):
            wait_for(lambda: not self.project.processes())
        killed.problems += [f"still running: {process}" for process in self.project.processes()]
        return killed

    def _strike(self, kill: Kill, running: Running) -> bool:
        """Signal the processes that the kill names, and wait for the killed; whether there were any."""
        victims = list(_victims(kill.target, running))
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(kill.signal)
        if kill.signal == signal.SIGKILL:
            psutil.wait_procs(victims, 10)
        return bool(victims)

    def _again(self, kind: str, name: str, running: Running, killed: Killed) -> Running:
        """Give a command that has ended again, once nothing is left of it."""
        code = running.wait().code
        if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):
            killed.problems.append(f"the command ended with {code}: {running.wait().said[-1500:]}")
        wait_for(lambda: not self.project.processes())
        return self.start(kind, name)


def planned(kind: str, draw: random.Random, number: int) -> Iterator[Kill]:
    """Kills at ascending steps."""
    two = kind.endswith("2 ranks")
    method = kind.split()[0]
    steps = sorted(draw.sample(range(RECIPES[method]["steps"] - 2), number))
    targets = OF_TURNS if method == "turns" else [target for target in TARGETS if two or target != "rank 1"]
    for step in steps:
        target = draw.choice(targets)
        yield Kill(target, draw.choice(SIGNALS), draw.choice(PHASES[method]), step)


def _victims(target: str, running: Running) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        supervisor = psutil.Process(running.process.pid)
        below = supervisor.children(recursive=True)
        workers = [process for process in below if _is_worker(process)]
        match target:
            case "supervisor":
                yield supervisor
            case "all processes":
                yield from (supervisor, *below)
            case "launcher":
                yield from (process for process in below if _is_launcher(process))
            case "worker":
                yield from (process for process in workers if process.environ().get("RANK", "0") == "0")
            case "environment":
                yield from _environments(below)[:1]
            case "zygote":
                yield from (process for process in below if _is_zygote(process) and _is_worker(process.parent()))
            case "rank 1":
                yield from (process for process in workers if process.environ().get("RANK") == "1")


def _is_launcher(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "accelerate.commands.launch" in process.cmdline()
    return False


def _is_worker(process: psutil.Process | None) -> bool:
    if process is None:
        return False
    with suppress(psutil.NoSuchProcess):
        argv = process.cmdline()
        return "trainer.worker" in argv and "accelerate.commands.launch" not in argv
    return False


def _is_zygote(process: psutil.Process | None) -> bool:
    """Whether it is a process that forks environments, or one of those."""
    if process is None:
        return False
    with suppress(psutil.NoSuchProcess):
        return "trainer.environments.zygote" in process.cmdline()
    return False


def _environments(below: list[psutil.Process]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [each for each in below if _is_zygote(each) and _is_zygote(each.parent())]
    return []


def _await(run: RunDir, kill: Kill, running: Running, draw: random.Random) -> str | None:
    """Wait for the moment of a kill; the phase that it strikes, or None where the command ended before."""
    is_now = _moment(run, kill, draw.random(), running)
    end = None
    while running.process.poll() is None:
        reached = run.newest_logged_step() >= kill.step and run.is_locked()
        end = end or (time.monotonic() + PATIENCE_S if reached else None)
        if reached and is_now():
            return kill.phase
        if end is not None and time.monotonic() > end:
            return "running"
        time.sleep(POLL_S)
    return None


def _moment(run: RunDir, kill: Kill, part: float, running: Running) -> Callable[[], bool]:
    """Whether the run is in the phase of a kill now."""
    begun: list[float] = []

    def is_after_wait() -> bool:
        begun.append(time.monotonic())
        return begun[-1] - begun[0] > part * 0.2

    match kill.phase:
        case "saving":
            return lambda: bool(run.unfinished_checkpoints())
        case "sampling":
            return lambda: bool(run.journal_chunks(run.newest_logged_step()))
        case "in a turn":
            return lambda: _is_in_turn(running)
        case "evaluating":
            return lambda: _is_evaluating(run, part)
    return is_after_wait


def _is_in_turn(running: Running) -> bool:
    """Whether environments are open."""
    with suppress(psutil.NoSuchProcess):
        return bool(_environments(psutil.Process(running.process.pid).children(recursive=True)))
    return False


def _is_evaluating(run: RunDir, part: float) -> bool:
    """Whether a step that ends with an evaluation is under way for most of the time of the one before."""
    records = run.newest_records(EVAL_INTERVAL + 2)
    if not records or (records[-1]["step"] + 1) % EVAL_INTERVAL:
        return False
    times = {record["step"]: record["time"] for record in records}
    before = records[-1]["step"] + 1 - EVAL_INTERVAL
    took = times[before] - times[before - 1] if {before, before - 1} <= times.keys() else 0.0
    return time.time() - records[-1]["time"] > (0.5 + part / 2) * took


def _name(kind: str) -> str:
    return kind.replace(" on ", "-").replace(" ranks", "ranks")


def _file(kind: str) -> str:
    return f"{_name(kind)}.yaml"


def kill_runs(
    project: Project, number: int, seed: int, kinds: Sequence[str] = KINDS
) -> tuple[list[Killed], Counter[str]]:
    """Strike `number` kills over runs of all kinds in turn; stops at the first run that is not equal.

    Args:
        project: a directory of its own.
        number: of kills.
        seed: of targets, signals, phases and steps.
        kinds: of `KINDS`.
    """
    harness, ended, struck = Harness(project), [], Counter[str]()
    while sum(struck.values()) < number:
        kind = kinds[len(ended) % len(kinds)]
        draw = random.Random(f"{seed}:{len(ended)}")
        killed = harness.survive(kind, len(ended), draw, number - sum(struck.values()))
        ended.append(killed)
        struck.update(f"{kind}: {kill}" for kill in killed.kills)
        verdict = "NOT equal" if killed.problems else "equal"
        kills = ", ".join(map(str, killed.kills)) or "no kill"
        print(f"{kind}: {verdict} after {kills}; {sum(struck.values())} of {number}", flush=True)
        if killed.problems:
            break
        shutil.rmtree(project.run(f"{_name(kind)}-{len(ended) - 1}").root)
    return ended, struck
