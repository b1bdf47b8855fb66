"""Inputs that were replaced between two attempts of several ranks: all of them stop, and none waits for another."""

from __future__ import annotations

import json
import socket
import sys

import pytest
from project import Project, Running

SHAPE = {
    "name": "cpu2", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16,
    "micro_batch_tokens": 256, "accelerate": "cpu",
    "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
}  # fmt: skip


def both(project: Project, *arguments: str) -> list[int]:
    """Exit codes of two ranks on gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [sys.executable, "-m", "trainer.worker", *arguments]
    started: list[Running] = [
        project.start(argv, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    return [running.wait().code for running in started]


@pytest.mark.parametrize("file", ["train.jsonl", "model/config.json"])
def test_every_rank_stops_where_an_input_was_replaced(project: Project, file: str) -> None:
    (project.root / "cpu2.yaml").write_text(json.dumps(SHAPE))
    project.recipe(steps=2, shape="cpu2.yaml", eval_interval=0)
    assert both(project, "recipe.yaml") == [0, 0]
    run = project.run("tiny")
    plan = json.loads((run.root / "plan.json").read_text())
    (run.root / "plan.json").write_text(json.dumps(plan | {"steps": 4}))
    whole = (project.root / file).read_text()
    (project.root / file).write_text(whole + "\n" if file.endswith("json") else whole.replace("sum", "SUM"))
    assert both(project, "runs/tiny") == [2, 2]
    assert "cannot continue: its inputs changed since it began" in run.outcome()["message"]
    assert run.steps() == [0, 1, 2]
    (project.root / file).write_text(whole)
    assert both(project, "runs/tiny") == [0, 0]
    assert run.steps() == [0, 1, 2, 3, 4]
