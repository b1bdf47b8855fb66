"""Runs as gauges in Prometheus's text format, for a textfile collector."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trainer.run.directory import RunDir

METRICS: Final = {
    "trainer_run_step": ("step", "Last step"),
    "trainer_run_step_seconds": ("perf/step_s", "Time of the last step"),
    "trainer_run_loss": ("train/loss", "Training loss of the last step"),
    "trainer_run_reward": ("rollout/reward", "Mean reward of the last step"),
    "trainer_run_held_out_loss": ("eval/loss", "Last held-out loss"),
    "trainer_run_held_out_reward": ("eval/reward", "Last held-out reward"),
    "trainer_run_tokens_per_second": ("perf/tokens_per_s", "Of the last step"),
    "trainer_run_time_seconds": ("time", "When the last step ended, since 1970"),
}
"""Metric by name in metrics.jsonl."""


def exposition(runs: Iterable[RunDir]) -> str:
    """The last value of each metric of each run, and its restarts."""
    values: dict[str, list[tuple[str, float]]] = {name: [] for name in (*METRICS, "trainer_run_restarts_total")}
    for run in runs:
        last: dict[str, float] = {}
        for record in run.read_metrics():
            last.update({key: value for key, value in record.items() if isinstance(value, int | float)})
        for name, (key, _) in METRICS.items():
            if key in last:
                values[name].append((run.name, last[key]))
        restarts = max(0, len({attempt.get("attempt") for attempt in run.read_attempts()}) - 1)
        values["trainer_run_restarts_total"].append((run.name, restarts))
    lines = []
    for name, found in values.items():
        text = METRICS[name][1] if name in METRICS else "Attempts after the first one"
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f'{name}{{run="{run}"}} {value!r}' for run, value in found]
    return "\n".join(lines) + "\n"
