"""Runs with faults, and whether they equal one without: what test_chaos.py and scripts/chaos share."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil
from chaos_disk import apply_cut, damage
from chaos_server import RewardServer
from project import BIN, PATIENCE_S, Project, Run, wait_for
from safetensors.torch import load_file, save_file

import trainer

CHAOS: Final = Path(__file__).with_name("chaos")
RECOVERY: Final = {"restart_backoff_s": 0, "max_restarts": 20, "max_bad_steps": 2}
SFT: Final[dict[str, Any]] = {
    "name": "sft", "steps": 40, "eval_interval": 4, "dcp_save_interval": 2, "recovery": RECOVERY,
    "model__path": "poisoned", "data__train": "poisoned.jsonl", "lora__dropout": 0.1,
}  # fmt: skip
"""Two rows break the loss, so that the run goes back once and leaves them out."""
RFT: Final[dict[str, Any]] = {
    "name": "rft", "method": "rft", "steps": 12, "eval_interval": 4, "dcp_save_interval": 2, "recovery": RECOVERY,
    "data": {"train": "prompts.jsonl", "eval": "held_out.jsonl", "eval_rows": 6, "max_seq_tokens": 128},
    "rows_per_step": 4, "algorithm": {"minibatches_per_step": 2},
    "rollout": {"group_size": 4, "max_completion_tokens": 10, "chunk_prompts": 1, "eval_samples": 2},
    "reward_limits": {"timeout_s": 30},
}  # fmt: skip
RECIPES: Final = {"sft": SFT, "rft": RFT}
BAD_LINES: Final = (5, 17)


@dataclass(frozen=True)
class Fault:
    """What strikes, where, and when (see chaos/sitecustomize.py)."""

    point: str
    action: str = "kill"
    nth: int = 1
    then: str = ""
    """`damage`: a byte of the newest checkpoint changes before the next attempt."""

    def __str__(self) -> str:
        what = {"cut": "power cut", "torn": "power cut, torn"}.get(self.action, self.action)
        return f"{what} at {self.point}, nr. {self.nth}" + (f", then {self.then}" if self.then else "")


@dataclass
class Row:
    """A line of the table."""

    fault: str
    run: str
    survived: bool = False
    attempts: int = 0
    """How many there were when the run had ended."""
    lost_steps: int = 0
    """Steps beyond the last committed checkpoint that still had to be made again: 0 is right."""
    equal: bool = False


@dataclass
class Report:
    """How a run with faults ended."""

    rows: list[Row]
    problems: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    """Faults whose moment never came."""


@dataclass
class Attempt:
    """A worker that was forked."""

    zygote: Zygote
    pid: int
    err: Path

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        code = self.zygote.ask({"wait": self.pid, "timeout_s": timeout_s})
        assert code is not None, f"still running after {timeout_s} s: {self.err.read_text()}"
        return int(code)


class Zygote:
    """The process that forks attempts."""

    def __init__(self, project: Project) -> None:
        """Start it; its imports take seconds."""
        self.project, self.number = project, 0
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TRAINER_", "PYTEST_"))
        }
        environment |= settings()
        argv = [sys.executable, str(CHAOS / "zygote.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(argv, env=environment, cwd=CHAOS, **pipes)  # type: ignore[call-overload]
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request, return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, state: Path, *argv: str, cwd: Path | None = None) -> Attempt:
        """Start an attempt in the project's directory or another."""
        self.number += 1
        out, err = (state / f"{self.number}.{kind}" for kind in ("out", "err"))
        environment = {"CHAOS_STATE": str(state)}
        files = {"out": str(out), "err": str(err)}
        pid = self.ask({"argv": argv, "cwd": str(cwd or self.project.root), "environment": environment, **files})
        return Attempt(self, pid, err)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def settings(state: Path | None = None) -> dict[str, str]:
    """Environment of processes that faults may strike."""
    places = [str(CHAOS), str(Path(trainer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ours |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
    ours |= {"TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1", "CHAOS_OWNER": str(os.getpid())}
    return ours | ({"CHAOS_STATE": str(state)} if state is not None else {})


class Chaos:
    """A project whose runs are struck, and its undisturbed runs."""

    def __init__(self, project: Project, server: RewardServer) -> None:
        """Write rows, recipes and a model that two rows break."""
        self.project, self.zygote, self.server = project, Zygote(project), server
        poison(project.root)
        for name, recipe in RECIPES.items():
            project.recipe(f"{name}.yaml", **json.loads(json.dumps(recipe)))
        reward = {"use": "http_reward", "args": {"url": f"http://127.0.0.1:{server.port}", "num_retries": 6}}
        project.recipe("rft.yaml", **json.loads(json.dumps(RFT)), rewards=[reward])
        self.whole: dict[str, Run] = {}

    def undisturbed(self, kind: str) -> Run:
        """The run without faults, started as users start it."""
        if kind not in self.whole:
            done = self.project.worker(f"{kind}.yaml", "--name", f"{kind}-whole")
            assert done.code == 0, done.said
            self.whole[kind] = self.project.run(f"{kind}-whole")
        return self.whole[kind]

    def prepare(
        self,
        name: str,
        faults: Sequence[Fault],
        mutant: str = "",
        *,
        is_flock_off: bool = False,
        run: Path | None = None,
    ) -> Path:
        """The directory of what a run's faults are and how far they are."""
        state = self.project.root / "states" / name
        state.mkdir(parents=True)
        plan = {"run": str(run or self.project.run(name).root), "faults": [asdict(fault) for fault in faults]}
        (state / "plan.json").write_text(json.dumps(plan | {"mutant": mutant, "is_flock_off": is_flock_off}))
        return state

    def survive(
        self, name: str, kind: str, faults: Sequence[Fault], mutant: str = "", *, seed: int = 0, is_real: bool = False
    ) -> Report:
        """A run that faults strike one after the other, started again until it ends.

        Args:
            name: of the run.
            kind: of the recipe.
            faults: in order.
            mutant: a line of the product that is left out.
            seed: of torn power cuts.
            is_real: whether `trainer train` starts and restarts the workers, instead of the zygote.
        """
        state = self.prepare(name, faults, mutant)
        coin = random.Random(f"torn:{seed}")
        problems: list[str] = []
        for _ in range(len(faults) + 2):
            before = fired(state)
            code, said = self.attempt(state, kind, name, is_real=is_real)
            if (state / "cut.json").exists():
                self.project.kill_all()
                apply_cut(self.project.run(name).root, state, coin)
            struck = [faults[number] for number in range(before, fired(state))]
            if any(fault.then == "damage" for fault in struck):
                damage(self.project.run(name), state)
            if code == 0:
                break
            if code != -9 or not struck:
                problems.append(f"ended by itself with {code}: {said[-2000:]}")
                break
        return self.report(name, kind, faults, problems)

    def attempt(self, state: Path, kind: str, name: str, *, is_real: bool) -> tuple[int, str]:
        """One command, to its end: exit code and what it said."""
        argv = (f"{kind}.yaml", "--name", name)
        if is_real:
            done = self.project.start([str(BIN / "trainer"), "train", *argv], settings(state)).wait()
            return done.code, done.said
        started = self.zygote.start(state, *argv)
        return started.wait(), started.err.read_text()

    def two_at_once(self, name: str, asleep: Fault, mutant: str = "") -> Report:
        """With locks that do nothing: an attempt sleeps, another goes on with the run, and the first one wakes up."""
        faults = [asleep]
        run = self.project.run(name).root
        state = self.prepare(name, faults, mutant, is_flock_off=True)
        second_state = self.prepare(f"{name}.second", [Fault("metrics synced", "stop", 3)], is_flock_off=True, run=run)
        first = self.zygote.start(state, "sft.yaml", "--name", name)
        wait_for(is_stopped(first.pid))
        second = self.zygote.start(second_state, "sft.yaml", "--name", name)
        wait_for(is_stopped(second.pid))
        os.kill(first.pid, signal.SIGCONT)
        code = first.wait()
        problems = ["the older attempt wrote an outcome"] if (run / "outcome.json").exists() else []
        os.kill(second.pid, signal.SIGCONT)
        problems += [f"the newer attempt ended with {ended}" for ended in [second.wait()] if ended != 0]
        if code != 1 or "attempt 2 has taken over; attempt 1 stops" not in first.err.read_text():
            problems.append(f"the older attempt went on: {code}")
        report = self.report(name, "sft", faults, problems)
        return Report([replace(row, fault="two attempts, no lock", attempts=2) for row in report.rows], report.problems)

    def report(self, name: str, kind: str, faults: Sequence[Fault], problems: Sequence[str] = ()) -> Report:
        """Compare with the undisturbed run."""
        state = self.project.root / "states" / name
        found = [*problems, *differences(self.project.run(name), self.undisturbed(kind))]
        try:
            wait_for(lambda: not self.project.processes())
        except AssertionError:
            found.append(f"still running: {self.project.processes()}")
        events = read_events(state)
        starts = sum(event["event"] == "start" for event in events)
        lost = lost_steps(events)
        rows = []
        for number, fault in enumerate(faults):
            if number in lost:
                rows.append(Row(str(fault), name, not found, starts, lost[number], not found))
        found += [f"{row.fault}: {row.lost_steps} steps lost" for row in rows if row.lost_steps]
        return Report(rows, found, [str(fault) for number, fault in enumerate(faults) if number not in lost])


def fired(state: Path) -> int:
    """How many faults have struck."""
    return len(list(state.glob("fired-*")))


def read_events(state: Path) -> list[dict[str, Any]]:
    """What the workers did."""
    file = state / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lost_steps(events: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Of each fault that struck, the steps between the last committed checkpoint and where the next attempt began."""
    committed, starts, lost = -1, False, {}
    waiting: dict[int, int] = {}
    for event in events:
        match event["event"]:
            case "start":
                starts = True
            case "committed":
                committed = max(committed, event["step"])
            case "damaged":
                committed = event["step"]
                waiting = dict.fromkeys(waiting, committed)
            case "fault":
                waiting[event["number"]] = committed
                lost[event["number"]] = 0
                starts = False
            case "resumed" if starts:
                lost |= {number: max(0, step - event["step"]) for number, step in waiting.items()}
                waiting = {}
                starts = False
    return lost


def differences(run: Run, whole: Run) -> list[str]:
    """What is not as in the undisturbed run; to the bit."""
    found = []
    steps, wanted = run.steps(), whole.steps()
    if steps != wanted:
        twice = sorted({step for step in steps if steps.count(step) > 1})
        found.append(f"metrics: steps twice {twice}, missing {sorted(set(wanted) - set(steps))}, in all {len(steps)}")
    elif run.values() != whole.values():
        pairs = zip(run.values(), whole.values(), strict=True)
        found.append(f"metrics: values differ from step {next(a['step'] for a, b in pairs if a != b)} on")
    for name in ("adapter", "adapter-best"):
        if not (run.root / name / "adapter_model.safetensors").exists():
            found.append(f"{name}: missing")
        elif run.adapter(name) != whole.adapter(name):
            found.append(f"{name}: other bytes")
    if not (run.root / "outcome.json").exists() or run.outcome()["state"] != "finished":
        found.append("outcome.json does not say that it is finished")
    numbers = [attempt["attempt"] for attempt in run.attempts()]
    if numbers != sorted(set(numbers)):
        found.append(f"attempts.jsonl: {numbers}")
    found += [f"left behind: {path.name}" for path in (run.root / "checkpoints").glob(".step-*")]
    return found


def poison(root: Path) -> None:
    """A model for which a letter in two rows is not a number; prompts for RFT."""
    import torch

    shutil.copytree(root / "model", root / "poisoned", dirs_exist_ok=True)
    tokens = json.loads((root / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    weights = root / "poisoned" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][tokens["~"]] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    lines = (root / "train.jsonl").read_text().splitlines()
    for number in BAD_LINES:
        lines[number - 1] = lines[number - 1].replace("what", "~what")
    (root / "poisoned.jsonl").write_text("\n".join(lines) + "\n")
    for rows, prompts in (("train.jsonl", "prompts.jsonl"), ("eval.jsonl", "held_out.jsonl")):
        turns = [json.loads(line)["messages"] for line in (root / rows).read_text().splitlines()]
        (root / prompts).write_text("".join(json.dumps({"messages": messages[:-1]}) + "\n" for messages in turns))


def is_stopped(pid: int) -> Callable[[], bool]:
    """Whether a process stands still."""
    return lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED


@contextmanager
def chaos(project: Project) -> Iterator[Chaos]:
    """Everything, started and ended."""
    server = RewardServer()
    found = Chaos(project, server)
    try:
        yield found
    finally:
        project.kill_all()
        found.zygote.close()
        server.down()


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    lines = [f"{'fault':58}{'run':22}{'survived':>9}{'attempts':>9}{'lost':>5}{'equal':>6}"]
    for row in rows:
        verdict = ("yes" if row.survived else "NO", row.attempts, row.lost_steps, "yes" if row.equal else "NO")
        lines.append("{:58}{:22}{:>9}{:>9}{:>5}{:>6}".format(row.fault, row.run, *verdict))
    return "\n".join(lines)
