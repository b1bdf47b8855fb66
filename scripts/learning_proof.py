"""What RFT learned, for several seeds: held-out reward before and after, paired bootstrap, curves, completions."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RESAMPLES: Final = 2000
MIN_RISE: Final = 0.2


@dataclass(frozen=True)
class Task:
    """Where a task's runs and results are, and which value besides the reward is shown."""

    runs: str
    """Their names, without the seed."""
    out: Path
    """Without the ending."""
    recipes: str
    shown: str
    """Key of the metrics; or a role, whose messages in an answer are counted."""
    shown_as: str


OUT: Final = Path("benchmarks/results")
TASKS: Final = {
    "quickstart": Task(
        "learning_proof_",
        OUT / "learning_proof",
        "recipes/rft_quickstart.yaml",
        "eval/reward/has_number",
        "a number at all",
    ),
    "calculator": Task(
        "learning_proof_calculator_",
        OUT / "learning_proof_calculator",
        "recipes/sft_calculator.yaml, then recipes/rft_calculator.yaml",
        "tool",
        "calls of the tool",
    ),
    "guess": Task(
        "learning_proof_guess_",
        OUT / "learning_proof_guess",
        "recipes/sft_guess.yaml, then recipes/rft_guess.yaml",
        "assistant",
        "guesses",
    ),
}


def main(name: str, seeds: list[str]) -> None:
    """Read the runs, write JSON and Markdown; exit 1 if a seed did not learn.

    Args:
        name: of the task.
        seeds: of its runs.
    """
    task = TASKS[name]
    proofs = [proof(task, seed) for seed in seeds]
    task.out.with_suffix(".json").write_text(json.dumps({"seeds": proofs}, indent=1) + "\n")
    lines = [
        f"`scripts/learning_proof {name}`: {task.recipes}, {proofs[0]['steps']} steps,",
        f"{proofs[0]['rows']} held-out rows of wordings and numbers absent from training,",
        f"{proofs[0]['samples']} answers each.\n",
        f"| seed | before | after | rise (95% paired bootstrap) | {task.shown_as}, before -> after | minutes "
        "| commit |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for each in proofs:
        rise = f"{each['rise']:+.3f} ({each['rise_low']:+.3f} to {each['rise_high']:+.3f})"
        form = f"{each['format_before']:.2f} -> {each['format_after']:.2f}"
        lines.append(
            f"| {each['seed']} | {each['before']:.3f} | {each['after']:.3f} | {rise} | {form} | {each['minutes']:.1f} "
            f"| {each['commit'][:12]} |"
        )
    lines += [
        "\nReward of the rollouts by step:\n",
        "| seed | " + " | ".join(map(str, proofs[0]["curve_steps"])) + " |",
    ]
    lines.append("|---|" + "---:|" * len(proofs[0]["curve_steps"]))
    lines += [f"| {each['seed']} | " + " | ".join(f"{value:.2f}" for value in each["curve"]) + " |" for each in proofs]
    lines.append("\nTen held-out prompts of the first seed, the first answer before and after:\n")
    lines += [f"- `{where}`: {before!r} -> {after!r}" for where, before, after in proofs[0]["completions"]]
    task.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    unproved = [each["seed"] for each in proofs if each["rise"] < MIN_RISE or each["rise_low"] <= 0]
    if unproved:
        sys.exit(f"not proved for seeds {', '.join(unproved)}: the rise is below {MIN_RISE} or its interval includes 0")


def proof(task: Task, seed: str) -> dict[str, Any]:
    """One seed's run.

    Args:
        task: whose run it is.
        seed: of the run.
    """
    run = Path("runs") / f"{task.runs}{seed}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    files = sorted((run / "evaluations").iterdir())
    before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in (files[0], files[-1]))
    pairs = [(earned(old), earned(new)) for old, new in zip(before, after, strict=True)]
    low, high = paired_interval([new - old for old, new in pairs], seed)
    steps = [record for record in records if record["step"]]
    shown = steps[:: max(1, len(steps) // 10)]
    return {
        "seed": seed,
        "commit": " ".join(dict.fromkeys(attempt["git_commit"] or "unknown" for attempt in attempts)),
        "steps": records[-1]["step"],
        "rows": len(before),
        "samples": len(before[0]["answers"]),
        "before": sum(old for old, _ in pairs) / len(pairs),
        "after": sum(new for _, new in pairs) / len(pairs),
        "rise": sum(new - old for old, new in pairs) / len(pairs),
        "rise_low": low,
        "rise_high": high,
        "format_before": records[0].get(task.shown, num_messages(before, task.shown)),
        "format_after": records[-1].get(task.shown, num_messages(after, task.shown)),
        "minutes": (records[-1]["time"] - records[0]["time"]) / 60,
        "curve_steps": [record["step"] for record in shown],
        "curve": [record["rollout/reward"] for record in shown],
        "completions": [
            (old["where"], old["answers"][0]["text"][:80], new["answers"][0]["text"][:80])
            for old, new in list(zip(before, after, strict=True))[:10]
        ],
    }


def earned(record: dict[str, Any]) -> float:
    """Mean reward of a row's answers; a failed one counts as 0."""
    rewards = [answer["reward"] or 0.0 for answer in record["answers"]]
    return sum(rewards) / len(rewards)


def num_messages(evaluation: list[dict[str, Any]], role: str) -> float:
    """Mean number of messages by a role in an answer."""
    answers = [answer for record in evaluation for answer in record["answers"]]
    said = [message["role"] for answer in answers for message in answer.get("messages", [])]
    return said.count(role) / len(answers)


def paired_interval(differences: list[float], seed: str) -> tuple[float, float]:
    """95% percentile interval of the mean difference, rows resampled."""
    generator = random.Random(f"paired:{seed}")
    means = sorted(sum(generator.choices(differences, k=len(differences))) / len(differences) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
