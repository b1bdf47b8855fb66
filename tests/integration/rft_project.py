"""What the tests of RFT share: the recipe, a project with prompts and rewards, the journal read back."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import pytest
from project import Project, Run

from trainer.run.directory import RunDir
from trainer.run.journal import read_step
from trainer.worker import main

RECIPE: Final[dict[str, Any]] = {
    "name": "rft",
    "method": "rft",
    "data": {"train": "prompts.jsonl", "eval": "held_out.jsonl", "eval_rows": 6, "max_seq_tokens": 128},
    "rows_per_step": 6,
    "steps": 5,
    "algorithm": {"minibatches_per_step": 2},
    "rollout": {"group_size": 4, "max_completion_tokens": 10, "chunk_prompts": 1, "eval_samples": 2},
    "rewards": [{"use": "rewards.py:digits"}],
}
"""Six chunks a step; evaluated and saved at every second step."""
NO_EVALUATION: Final[dict[str, Any]] = {"data__eval": None, "eval_interval": 0}


def prepare(project: Project) -> Project:
    """Put prompts and rewards beside the recipe."""
    shutil.copy(Path(__file__).with_name("rft_rewards.py"), project.root / "rewards.py")
    for rows, prompts in (("train.jsonl", "prompts.jsonl"), ("eval.jsonl", "held_out.jsonl")):
        turns = [json.loads(line)["messages"] for line in (project.root / rows).read_text().splitlines()]
        text = "".join(json.dumps({"messages": messages[:-1]}) + "\n" for messages in turns)
        (project.root / prompts).write_text(text)
    project.recipe("rft.yaml", **deepcopy(RECIPE))
    return project


def run_here(project: Project, name: str, *, code: int = 0, **changes: Any) -> Run:
    """Run a recipe's worker in this process, which spares its start; `code` is what it must return."""
    project.recipe(f"{name}.yaml", **{**deepcopy(RECIPE), "name": name, **changes})
    return work(project, f"{name}.yaml", name, code=code)


def work(project: Project, file: str, name: str, *, code: int = 0) -> Run:
    """Run the worker of a recipe that is written already."""
    with _handlers_restored(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)  # not for longer: `kill_all` kills whatever works there
        assert main([file]) == code
    return project.run(name)


@contextmanager
def _handlers_restored() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def journal(run: Run, step: int | None = None) -> dict[str, bytes]:
    """The text of every chunk, by its place; also of compressed ones."""
    place = "*" if step is None else f"step-{step:06d}"
    files = sorted(
        run.root.glob(f"rollouts/{place}/chunk-*"), reverse=True
    )  # a plain one counts before a compressed one
    return {
        str(file.relative_to(run.root)).removesuffix(".gz"): gzip.decompress(file.read_bytes())
        if file.suffix == ".gz"
        else file.read_bytes()
        for file in files
    }


def rollouts(run: Run, step: int) -> list[dict[str, Any]]:
    """The rollout records of a step, from 0, in order."""
    return [record for group in read_step(RunDir(run.root), step) for record in group.rollouts]
