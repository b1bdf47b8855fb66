"""The two sides of a comparison as processes, each with thread settings of its own, that measure when they are told to.

GNU's OpenMP library reads its settings when it is loaded, so two settings need two processes. The process that is not
asked waits for its standard input; its idle threads sleep after at most a fraction of a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

HERE: Final = Path(__file__).parent
MARK: Final = "@@ "
"""Begins the lines that are results; libraries print others."""
POLICIES: Final[Mapping[str, Mapping[str, str]]] = {
    "idle threads sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "idle threads spin 2,000 times": {"GOMP_SPINCOUNT": "2000"},
    "idle threads spin 200,000 times": {"GOMP_SPINCOUNT": "200000"},
}
ONE_THREAD: Final[Mapping[str, Mapping[str, str]]] = {"one thread": {"OMP_WAIT_POLICY": "PASSIVE"}}


class Side:
    """A process that runs `serve` of one side."""

    def __init__(self, script: str, side: str, arguments: list[str], threads: int, policy: Mapping[str, str]) -> None:
        """Start it, and wait until its first, unmeasured round is over.

        Args:
            script: file name in benchmarks/.
            side: `ours` or `trl`.
            arguments: further ones of the script.
            threads: of OpenMP.
            policy: variables of the environment.
        """
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        environment = inherited | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | dict(policy)
        self._argv = [sys.executable, str(HERE / script), "--serve", side, *arguments]
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.conditions = self._answer()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its standard input, which ends it

    def measure(self) -> dict[str, Any]:
        """One round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        self._process.communicate()
        raise RuntimeError(f"{' '.join(self._argv)} ended with {self._process.returncode}")


def serve(conditions: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Answer each line of the standard input with a round; the other end of `Side`.

    Args:
        conditions: of this process; the first answer.
        measure: a round, as it is handed on.
    """
    measure()
    print(MARK + json.dumps(conditions), flush=True)
    for _ in sys.stdin:
        print(MARK + json.dumps(measure()), flush=True)


def best_policy(
    script: str, side: str, arguments: list[str], threads: int, speed: Callable[[dict[str, Any]], float]
) -> tuple[str, dict[str, float]]:
    """The thread policy under which a side is fastest in a trial round, and the speed under each.

    Args:
        script: file name in benchmarks/.
        side: `ours` or `trl`.
        arguments: further ones of the script.
        threads: of OpenMP.
        speed: of a round; higher is better.
    """
    speeds = {}
    for name, policy in (POLICIES if threads > 1 else ONE_THREAD).items():
        with Side(script, side, arguments, threads, policy) as process:
            speeds[name] = speed(process.measure())
        print(f"{script} {side}, {threads} threads, {name}: {speeds[name]:.3g}", file=sys.stderr, flush=True)
    return max(speeds, key=lambda name: speeds[name]), speeds


def alternate(
    script: str,
    arguments: list[str],
    threads: int,
    rounds: int,
    speed: Callable[[dict[str, Any]], float],
    policies: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Both sides, each under its best policy, in alternating rounds.

    Args:
        script: file name in benchmarks/.
        arguments: further ones of the script.
        threads: of OpenMP.
        rounds: how many.
        speed: of a round; higher is better.
        policies: of each side, by name; None: found by trial rounds.
    """
    trials: dict[str, dict[str, float]] = {}
    if policies is None:
        found = {side: best_policy(script, side, arguments, threads, speed) for side in ("ours", "trl")}
        policies, trials = (
            {side: name for side, (name, _) in found.items()},
            {side: each for side, (_, each) in found.items()},
        )
    known = {**POLICIES, **ONE_THREAD}
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with (
        Side(script, "ours", arguments, threads, known[policies["ours"]]) as ours,
        Side(script, "trl", arguments, threads, known[policies["trl"]]) as trl,
    ):
        for number in range(rounds):
            for side, process in (("ours", ours), ("trl", trl))[:: 1 if number % 2 == 0 else -1]:
                results[side].append(process.measure())
                print(
                    f"{script} {side}, {threads} threads: {speed(results[side][-1]):.3g}", file=sys.stderr, flush=True
                )
        conditions, failed = ours.conditions, trl.conditions.get("did_not_run", {})
    return {
        "threads": threads,
        "policies": dict(policies),
        "trials": trials,
        "conditions": conditions,
        "did_not_run": failed,
        "rounds": results,
    }
