"""Tasks of lm-eval on the weights of a run: named benchmarks, or tasks over local JSONL files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import yaml

from trainer.errors import LaunchError, UserError
from trainer.inference.chat_model import ChatModel

ENDINGS: Final = (".yaml", ".yml")
NO_NUMBERS: Final = ("alias", "name", "sample_len", "sample_count")


@final
@dataclass(frozen=True)
class BenchmarkReport:
    """What one model got.

    `BenchmarkReport("sums", {"arc_easy": {"acc,none": 0.41, "acc_stderr,none": 0.02}}, {"arc_easy": 200})`.
    """

    model: str
    results: dict[str, dict[str, float]]
    """Of each task, by metric and filter."""
    rows: dict[str, int]


def run_tasks(model: ChatModel, tasks: Sequence[str], rows: int | None, *, as_chat: bool) -> BenchmarkReport:
    """Run tasks.

    Args:
        model: the model.
        tasks: names that lm-eval knows, or YAML files of tasks; paths of rows in one are relative to it.
        rows: the first rows of each only; None for all.
        as_chat: render prompts with the chat template.

    Raises:
        LaunchError: lm-eval is not installed.
        UserError: a task does not exist, or its rows cannot be loaded.
    """
    try:
        from lm_eval import evaluator

        from trainer.inference.harness_model import HarnessModel
    except ImportError as error:
        raise LaunchError(f"--tasks needs lm-eval ({error}); pip install 'tunesmith[evals]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = [_task(name.strip()) for name in tasks]
    try:
        done = evaluator.simple_evaluate(
            model=HarnessModel(model),
            tasks=asked,
            limit=rows,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=as_chat,
        )
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"--tasks {','.join(tasks)}: {error}\n"
            "A named task takes its rows from a hub; a YAML file may name local ones."
        ) from None
    assert done is not None, "there is one rank"
    return BenchmarkReport(model.source.label, _numbers(done["results"]), _sizes(done.get("n-samples", {})))


def _task(name: str) -> str | dict[str, Any]:
    """A name, or the content of a YAML file with the paths of its rows made absolute."""
    if not name.endswith(ENDINGS):
        return name
    try:
        config = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{name}: cannot be read as a task of lm-eval: {error}") from None
    if not isinstance(config, dict) or "task" not in config:
        raise UserError(f"{name}: is no task of lm-eval: it has no field `task`")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        config["dataset_kwargs"]["data_files"] = _absolute(files, Path(name).resolve().parent)
    return config


def _absolute(files: Any, directory: Path) -> Any:
    if isinstance(files, dict):
        return {name: _absolute(each, directory) for name, each in files.items()}
    if isinstance(files, list):
        return [_absolute(each, directory) for each in files]
    return str(directory / files)


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        task: {
            metric: float(value)
            for metric, value in values.items()
            if metric not in NO_NUMBERS and isinstance(value, int | float)
        }
        for task, values in results.items()
    }


def _sizes(samples: dict[str, dict[str, int]]) -> dict[str, int]:
    return {task: sizes["effective"] for task, sizes in samples.items()}


def benchmark_lines(reports: Sequence[BenchmarkReport]) -> list[str]:
    """The reports as a table: a line per task and metric, a column per model.

    Args:
        reports: of the models, with the same tasks.
    """
    table = [["task", "metric", "rows", *(each.model for each in reports)]]
    first = reports[0]
    for task, values in first.results.items():
        for metric in values:
            if "_stderr" in metric:
                continue
            cells = [_cell(each.results[task], metric) for each in reports]
            table.append([task, metric.removesuffix(",none"), str(first.rows.get(task, "")), *cells])
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _cell(values: dict[str, float], metric: str) -> str:
    name, comma, kind = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{kind}")
    return f"{values[metric]:.4f}" + (f" +- {error:.4f}" if error is not None else "")
