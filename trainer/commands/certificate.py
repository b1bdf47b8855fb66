"""What `trainer verify-resume` found: two runs compared, as a document and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trainer.errors import LaunchError
from trainer.files import file_sha256
from trainer.run.directory import RunDir
from trainer.run.journal import count_sampled

ENVIRONMENT: Final = ("machine", "processor", "threads", "ranks", "python", "versions", "shape")
"""What must be alike in all attempts: other machines, threads or versions give other bits."""
GPU_TOLERANCE: Final = 0.02
"""On a GPU without deterministic kernels: largest relative difference of a metric."""


def compare_runs(whole: RunDir, interrupted: RunDir, *, tolerance: float = 0.0) -> dict[str, Any]:
    """Whether a run that was interrupted equals one that was not.

    Args:
        whole: nobody interrupted it.
        interrupted: the other.
        tolerance: largest relative difference of a metric; 0 compares bits, of the weights too.

    Raises:
        LaunchError: they ran on unlike machines, threads or versions.
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
    """The records of metrics.jsonl without what may differ: times and rates."""
    return [
        {name: value for name, value in record.items() if name != "time" and not name.startswith("perf/")}
        for record in run.read_metrics()
    ]


def weights_digests(run: RunDir) -> dict[str, str]:
    """SHA-256 of each file of trained weights, by its path in the run directory."""
    found = {}
    for name in ("adapter", "adapter-best", "model", "model-best"):
        for file in sorted((run.root / name).glob("*.safetensors")):
            found[f"{name}/{file.name}"] = file_sha256(file)
    return found


def certificate_lines(certificate: Mapping[str, Any]) -> list[str]:
    """The document as a table for people."""
    environment = certificate["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows = [
        ("recipe", certificate["recipe"]),
        ("machine", f"{environment['processor']}, {environment['threads']} threads, {environment['ranks']} ranks"),
        ("versions", f"python {environment['python']}, {versions}"),
    ]
    for number, kill in enumerate(certificate["kills"], start=1):
        what = f"SIG{certificate['signal']} at step {kill['at_step']} while {kill['phase']}"
        rows.append((f"kill {number}", f"{what}; {kill['steps_repeated']} steps were made again"))
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
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {text}" for name, text in rows]


def _one_environment(*runs: RunDir) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for line in run.attempts_file.read_text().splitlines():
            about = json.loads(line)
            environment = {name: about[name] for name in ENVIRONMENT}
            found[json.dumps(environment, sort_keys=True)] = environment
    if len(found) > 1:
        first, second, *_ = found.values()
        unlike = ", ".join(f"{name}: {first[name]} and {second[name]}" for name in first if first[name] != second[name])
        raise LaunchError(f"the attempts ran under unlike conditions, which give other bits: {unlike}")
    return next(iter(found.values()))


def _metric_problems(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], tolerance: float
) -> list[str]:
    steps, wanted = [record["step"] for record in ours], [record["step"] for record in theirs]
    if steps != wanted:
        twice = sorted({step for step in steps if steps.count(step) > 1})
        missing = sorted(set(wanted) - set(steps))
        return [f"steps: {len(steps)} records instead of {len(wanted)}; twice: {twice}, missing: {missing}"]
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
