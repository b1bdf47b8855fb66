"""Compare two runs for `trainer verify-resume`: a JSON document and a table of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trainer.commands.tables import table_lines
from trainer.errors import LaunchError
from trainer.files import file_sha256
from trainer.run.directory import RunDir
from trainer.run.journal import count_sampled

ENVIRONMENT: Final = ("machine", "processor", "threads", "ranks", "python", "versions", "shape")
"""What must be equal in all attempts: another machine, thread count or version gives other bits."""
GPU_TOLERANCE: Final = 0.02
"""On a GPU without deterministic kernels: largest relative difference of a metric."""


def compare_runs(whole: RunDir, interrupted: RunDir, *, tolerance: float = 0.0) -> dict[str, Any]:
    """Whether a run that was interrupted equals one that was not.

    Args:
        whole: the run without interruptions.
        interrupted: the other run.
        tolerance: largest relative difference of a metric; 0 compares the bits of metrics and weights.

    Raises:
        LaunchError: they ran on different machines, thread counts or versions.
    """
    environment = _one_environment(whole, interrupted)
    ours, theirs = compared_metrics(interrupted), compared_metrics(whole)
    problems = _metric_problems(ours, theirs, tolerance)
    weights = {"whole": weights_digests(whole), "interrupted": weights_digests(interrupted)}
    are_weights_equal = weights["whole"] == weights["interrupted"]
    if not are_weights_equal and tolerance == 0:
        names = sorted(weights["whole"].keys() | weights["interrupted"].keys())
        differ = [name for name in names if weights["whole"].get(name) != weights["interrupted"].get(name)]
        problems.append(f"weights differ: {', '.join(differ)}")
    sampled, twice = count_sampled(interrupted)
    return {
        "equal": not problems,
        "tolerance": tolerance,
        "problems": problems,
        "steps": len([record for record in theirs if record["step"] > 0]),
        "weights_equal": are_weights_equal,
        "weights": weights["whole"],
        "attempts": {"whole": whole.newest_attempt(), "interrupted": interrupted.newest_attempt()},
        "tokens_sampled": sampled,
        "tokens_sampled_twice": twice,
        "environment": environment,
    }


def compared_metrics(run: RunDir) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without times and rates, which differ between equal runs."""
    return [
        {name: value for name, value in record.items() if name != "time" and not name.startswith("perf/")}
        for record in run.read_metrics()
    ]


def weights_digests(run: RunDir) -> dict[str, str]:
    """SHA-256 of each file of trained weights, by its path in the run directory."""
    files = (file for directory in run.all_weights() for file in sorted(directory.glob("*.safetensors")))
    return {str(file.relative_to(run.root)): file_sha256(file) for file in files}


def certificate_lines(certificate: Mapping[str, Any]) -> list[str]:
    """The certificate as a table for people."""
    environment = certificate["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows = [
        ("recipe", certificate["recipe"]),
        ("machine", f"{environment['processor']}, {environment['threads']} threads, {environment['ranks']} ranks"),
        ("versions", f"python {environment['python']}, {versions}"),
    ]
    for number, kill in enumerate(certificate["kills"], start=1):
        what = f"SIG{certificate['signal']} at step {kill['at_step']} while {kill['phase']}"
        rows.append((f"kill {number}", f"{what}; {kill['steps_repeated']} steps were repeated"))
    rows.append(
        (
            "tokens",
            f"{certificate['tokens_sampled']:,} sampled, {certificate['tokens_sampled_twice']:,} of them twice"
            if certificate["tokens_sampled"]
            else "none sampled",
        )
    )
    exactly = "to the bit" if certificate["tolerance"] == 0 else f"within {certificate['tolerance']:g}"
    rows.append(("metrics", f"{certificate['steps']} steps, {exactly}" if certificate["equal"] else "DIFFER"))
    rows += [(name, digest[:16]) for name, digest in certificate["weights"].items() if certificate["weights_equal"]]
    rows += [("difference", problem) for problem in certificate["problems"]]
    rows.append(("verdict", "equal" if certificate["equal"] else "NOT EQUAL"))
    return table_lines(rows)


def _one_environment(*runs: RunDir) -> dict[str, Any]:
    environments: dict[str, dict[str, Any]] = {}
    for attempt in (attempt for run in runs for attempt in run.read_attempts()):
        environment = {name: attempt[name] for name in ENVIRONMENT}
        environments[json.dumps(environment, sort_keys=True)] = environment
    if len(environments) > 1:
        first, second, *_ = environments.values()
        changes = [f"{name}: {first[name]} and {second[name]}" for name in first if first[name] != second[name]]
        raise LaunchError(
            f"the attempts ran under different conditions, which give other bits: {', '.join(changes)}. "
            "Run the command again on one machine without changing these."
        )
    return next(iter(environments.values()))


def _metric_problems(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], tolerance: float
) -> list[str]:
    """The first difference between the metrics of two runs; empty where there is none."""
    steps, expected = [record["step"] for record in ours], [record["step"] for record in theirs]
    if steps != expected:
        repeated = sorted(step for step, number in Counter(steps).items() if number > 1)
        missing = sorted(set(expected) - set(steps))
        return [f"steps: {len(steps)} records instead of {len(expected)}; twice: {repeated}, missing: {missing}"]
    for mine, other in zip(ours, theirs, strict=True):
        names = sorted(mine.keys() | other.keys())
        differ = [name for name in names if not _is_close(mine.get(name), other.get(name), tolerance)]
        if differ:
            name = differ[0]
            return [f"step {mine['step']}: {name} is {mine.get(name)} and was {other.get(name)} ({len(differ)} differ)"]
    return []


def _is_close(ours: Any, theirs: Any, tolerance: float) -> bool:
    if tolerance == 0 or not (isinstance(ours, float) and isinstance(theirs, float)):
        return bool(ours == theirs)
    return math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance)
