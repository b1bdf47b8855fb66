"""An environment that does what a turn says, its settings, and turns as the trainer sends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.environments.pool import EnvironmentSettings
from trainer.environments.tool_calls import parse_turn
from trainer.types import Row

ENVIRONMENT = '''
import ctypes, os, subprocess, sys, time
from trainer.environments.contract import Observation, Start

LOADED = os.getpid()

class Obedient:
    """Does what the turn says."""

    def reset(self, row, *, seed):
        self.row, self.seed, self.seen = row, seed, 0
        return Start([{"role": "user", "content": row["ask"]}])

    def step(self, turn):
        self.seen += 1
        match turn.text:
            case "raise": raise LookupError("no such thing")
            case "sleep": time.sleep(1000)
            case "deaf": ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
            case "exit": os._exit(3)
            case "sys.exit": sys.exit(0)
            case "segfault": ctypes.string_at(0)
            case "hoard": bytearray(4 << 30)
            case "nan": return Observation([], done=True, reward=float("nan"))
            case "nothing": return Observation([], done=False)
            case "children": subprocess.Popen(["sleep", "986"]); return self.say("started")
            case "pids": return self.say(f"{LOADED} {os.getppid()} {os.getpid()}")
            case "print": print("x" * 100_000); sys.stdin.read(); return self.say("printed")
            case "right": return Observation([], done=True, reward=1.0, parts={"part": 0.5})
        return self.say(f"{self.seen} {self.seed}")

    def say(self, text):
        return Observation([{"role": "user", "content": text}], done=False)

    @staticmethod
    def group_rewards(rollouts):
        best = max(each.reward for each in rollouts)
        return [float(each.reward == best) for each in rollouts]

class NoStep:
    def reset(self, row, *, seed): ...

def add(a: int, b: int = 1) -> int:
    """Add two whole numbers.

    Not shown.
    """
    return a + b

def divide(a: float, b: float) -> float:
    """Divide."""
    return a / b

def untyped(a): return a
'''
ROW = Row({"ask": "What now?", "answer": "right"}, "rows.jsonl", 3, 2)
TELL = {"invalid_json": "tell", "unclosed": "tell", "unknown_tool": "tell", "bad_arguments": "tell"}


def settings(place: Path, **changes: Any) -> EnvironmentSettings:
    given = {"environment": "mine.py:Obedient", "tools": (), "errors": TELL, "base_dir": place, "timeout_s": 20.0}
    return EnvironmentSettings(**{**given, **changes})


def turn(text: str, number: int = 0) -> dict[str, Any]:
    parsed = parse_turn(text)
    calls = [call.__dict__ for call in parsed.calls]
    return {"number": number, "text": text, "message": parsed.message, "finish": "stop", "calls": calls}
