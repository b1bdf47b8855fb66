"""Inject random faults into tiny SFT and RFT runs: every run must equal an undisturbed one to the bit.

With --minutes the faults are at named points of a worker's file operations (POINTS) and at random ones. With --kills
real `trainer train` commands lose one or all of their processes (kills.py).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kills import KINDS, kill_runs

sys.path.remove(str(Path(__file__).resolve().parent))  # so that `chaos` is the package with the faults, not this script

from chaos_runs import Chaos, Fault, Report, Row, chaos, table
from project import Project

from conftest import write_files

ACTIONS = ["kill", "kill", "cut", "cut", "torn"]
SAVING = [
    "shard written", "manifest half", "manifest renamed", "target removed", "before rename", "renamed", "committed",
    "metrics half", "metrics synced", "rewind half", "rewind renamed",
]  # fmt: skip
POINTS = {
    "sft": [*SAVING, "excluded half", "excluded renamed", "best retired", "best renamed", "outcome half"],
    "rft": [*SAVING, "chunk half", "chunk renamed", "chunk synced", "outcome half"],
}
MAX_FAULTS = 10
REAL_SHARE = 0.15
"""Fraction of runs under `trainer train`, with supervisor and launcher; the others are bare workers (faster)."""


def main() -> int:
    """Inject faults until the time is over; return 1 at the first run that did not survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--minutes", type=float, help="faults in workers, for this long")
    amount.add_argument("--kills", type=int, help="this many kills of processes of `trainer train`")
    parser.add_argument("--kind", choices=KINDS, help="with --kills: runs of this kind only")
    parser.add_argument("--seed", type=int, default=None, help="repeats the same faults; random by default")
    parser.add_argument("--out", type=Path, default=Path("build/chaos.json"), help="file for the table as JSON")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    root = Path(tempfile.mkdtemp(prefix="chaos-")).resolve()
    project = Project(write_files(root))
    project.recipe()
    print(f"seed {seed}, in {root}", flush=True)
    if arguments.kills is not None:
        return kills(project, arguments.kills, seed, arguments.out, [arguments.kind] if arguments.kind else KINDS)
    end = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    missed = number = 0
    failed: Report | None = None
    with chaos(project) as it:
        while failed is None and (time.monotonic() < end or not number):
            report = strike(it, seed, number)
            rows += report.rows
            missed += len(report.missed)
            number += 1
            print(f"run {number}: {len(report.rows)} faults, {'NOT ' if report.problems else ''}survived", flush=True)
            failed = report if report.problems else None
    print(table(rows))
    print(f"{number} runs, {len(rows)} faults struck, {missed} never triggered; seed {seed}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"seed": seed, "minutes": arguments.minutes, "runs": number, "faults": [asdict(row) for row in rows]}
    problems = failed.problems if failed is not None else []
    arguments.out.write_text(json.dumps(document | {"missed": missed, "problems": problems}, indent=1) + "\n")
    print(f"written to {arguments.out}")
    if failed is None:
        shutil.rmtree(root)
        return 0
    print(f"FAILED with seed {seed}: {root}/runs/{failed.rows[0].run if failed.rows else ''}", *problems, sep="\n  ")
    return 1


def kills(project: Project, number: int, seed: int, out: Path, kinds: Sequence[str]) -> int:
    """Strike so many kills; return 1 where a run did not survive.

    Args:
        project: a directory of its own.
        number: of kills.
        seed: of what is killed, and when.
        out: file for the table as JSON.
        kinds: of runs.
    """
    start = time.monotonic()
    try:
        runs, struck = kill_runs(project, number, seed, kinds)
    finally:
        project.kill_all()
    problems = [problem for run in runs for problem in run.problems]
    for what, times in sorted(struck.items()):
        print(f"{times:3} x {what}")
    minutes = (time.monotonic() - start) / 60
    unequal = sum(bool(run.problems) for run in runs)
    print(f"{len(runs)} runs, {sum(struck.values())} kills, {unequal} unequal; seed {seed}, {minutes:.0f} minutes")
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"seed": seed, "minutes": minutes, "runs": len(runs), "kills": struck, "problems": problems}
    out.write_text(json.dumps(document, indent=1) + "\n")
    if not problems:
        shutil.rmtree(project.root)
        return 0
    print(f"FAILED with seed {seed}: {project.root}/runs", *problems, sep="\n  ")
    return 1


def strike(it: Chaos, seed: int, number: int) -> Report:
    """One run with its own random faults."""
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choice(["sft", "rft"])
    is_real = draw.random() < REAL_SHARE
    faults = []
    for _ in range(draw.randint(1, MAX_FAULTS)):
        point, nth = draw.choice(POINTS[kind]), draw.randint(1, 4)
        if draw.random() < 0.5:
            point, nth = "anywhere", draw.randint(1, 120)
        action = draw.choice(ACTIONS)
        can_damage = action == "kill" and point in ("committed", "metrics synced") and not is_real
        faults.append(Fault(point, action, nth, "damage" if can_damage and draw.random() < 0.3 else ""))
    name = f"{kind}-{number}" + ("-supervised" if is_real else "")
    report = it.survive(name, kind, faults, seed=seed + number, is_real=is_real)
    if not report.problems:
        shutil.rmtree(it.project.run(name).root)
        shutil.rmtree(it.project.root / "states" / name)
    return report


if __name__ == "__main__":
    sys.exit(main())
