"""Ranks that compute each pack together (context parallelism) make the run of one rank, on gloo."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from project import Project, Run, is_at_step, wait_for
from safetensors.torch import load_file
from tiny import tiny_model_dir

LAUNCH: Final = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
LIMIT: Final = {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}
SHAPE: Final[dict[str, Any]] = {
    "name": "split", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16, "context_parallel": 2,
    "micro_batch_tokens": 64, "accelerate": "cpu", "limits": {"lora": LIMIT, "full": LIMIT},
}  # fmt: skip
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "split": {},
    "grouped": {"gpus": 4},
    "sharded": {"gpus": 4, "sharding": "full"},
}
"""One group of two ranks; two groups; two groups whose four ranks also shard the base."""
RECIPE: Final[dict[str, Any]] = {
    "steps": 12, "eval_interval": 4, "dcp_save_interval": 4, "optimizer__schedule": "constant",
    "optimizer__learning_rate": 1e-3, "rows_per_step": 5, "recovery__probe_memory": "on",
}  # fmt: skip
"""Five rows a step: two groups have unequal numbers of rows, and in some steps of packs."""


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    for name, changes in SHAPES.items():
        (shared.root / f"{name}.yaml").write_text(json.dumps(SHAPE | changes | {"name": name}))
    return shared


@pytest.fixture(scope="module")
def alone(project: Project) -> dict[str, Run]:
    """The runs of one rank, with LoRA and with full parameters."""
    runs = {}
    for kind, lora in (("lora", {}), ("full", {"lora": None})):
        recipe = project.recipe(f"{kind}.yaml", name=kind, **RECIPE, **lora)
        done = project.worker(recipe, "--name", f"{kind}_alone")
        assert done.code == 0, done.said
        runs[kind] = project.run(f"{kind}_alone")
    return runs


def assert_close(ours: Run, theirs: Run, kind: str) -> None:
    """Metrics, held-out loss among them, and trained weights are equal to float32 rounding."""
    assert ours.steps() == theirs.steps()
    for record, other in zip(ours.values(), theirs.values(), strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-5)
    file = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}[kind]
    mine, wanted = load_file(ours.root / file), load_file(theirs.root / file)
    assert mine.keys() == wanted.keys()
    assert max(float((mine[name] - wanted[name]).abs().max()) for name in wanted) < 2e-5


@pytest.mark.parametrize(
    ("arch", "kind", "lengths", "ranks"),
    [
        ("llama", "lora", "1500,3", 2),  # both parts of the fused kernel
        ("llama", "lora", "20,30,7", 4),  # two groups, eager attention; a last chunk with padding
        ("gemma2", "lora", "40,500", 2),  # soft caps, a window of 8 tokens
        ("gpt_oss", "lora checkpointing", "40,90", 2),  # sinks, a window, experts
        ("qwen3", "full sharded checkpointing", "9,700", 4),
    ],
)  # fmt: skip
def test_logprobs_and_gradients_are_those_of_one_rank(
    project: Project, arch: str, kind: str, lengths: str, ranks: int
) -> None:
    model = tiny_model_dir(project.root / f"long-{arch}", arch, max_position_embeddings=4096)
    script = Path(__file__).with_name("context_ranks.py")
    paths = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    method, *options = kind.split()
    argv = [*LAUNCH, str(ranks), str(script), str(model), method, lengths, *options]
    done = project.start(argv, {"PYTHONPATH": paths}).wait()
    assert done.code == 0, done.said
    found = json.loads(done.stdout)
    total = sum(map(int, lengths.split(",")))
    padded = total + -total % 4
    assert [rank["tokens"] for rank in found["ranks"]] == [padded // 2] * ranks, "each has half of its group's pack"
    assert all(0 < rank["scored"] < found["theirs"]["tokens"] for rank in found["ranks"])
    assert max(rank["logprobs"] for rank in found["ranks"]) < 5e-5
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-6), "loss and tokens, over all ranks"
    assert found["largest"] > 1.0
    assert found["gradient"] < 1e-5 * found["largest"]


@pytest.mark.parametrize(
    ("kind", "shape"), [("lora", "split"), ("lora", "grouped"), ("lora", "sharded"), ("full", "sharded")]
)
def test_a_run_is_that_of_one_rank(project: Project, alone: dict[str, Run], kind: str, shape: str) -> None:
    done = project.trainer("train", f"{kind}.yaml", "--shape", f"{shape}.yaml", "--name", f"{kind}_{shape}")
    assert done.code == 0, done.said
    run = project.run(f"{kind}_{shape}")
    assert run.attempts()[0]["ranks"] == (SHAPE | SHAPES[shape])["gpus"]
    assert_close(run, alone[kind], kind)


@pytest.mark.heavy
def test_a_run_goes_from_two_ranks_to_one_and_to_four(project: Project, alone: dict[str, Run]) -> None:
    """A checkpoint does not depend on how packs were split."""
    for steps, shape in ((4, "split.yaml"), (8, "cpu"), (12, "grouped.yaml")):
        recipe = project.recipe(f"lora_{steps}.yaml", name="lora", **RECIPE | {"steps": steps})
        done = project.trainer("train", recipe, "--shape", shape, "--name", "moved")
        assert done.code == 0, done.said
    run = project.run("moved")
    assert [attempt["ranks"] for attempt in run.attempts()] == [2, 1, 4]
    assert_close(run, alone["lora"], "lora")


def test_stopped_run_goes_on_to_the_same_bits(project: Project) -> None:
    """The signal reaches one rank of a group only: neither abandons a pass that the other waits in."""
    recipe = project.recipe("long.yaml", name="long", **RECIPE | {"steps": 40, "eval_interval": 0})
    argv = [*LAUNCH, "2", "-m", "trainer.worker", recipe, "--shape", "split.yaml", "--name"]
    whole = project.start([*argv, "whole"]).wait()
    assert whole.code == 0, whole.said
    started, run = project.start([*argv, "stopped"]), project.run("stopped")
    wait_for(is_at_step(run, 6), started)
    (second,) = [each for each in project.processes() if each.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGTERM)
    started.wait()
    assert run.outcome()["state"] == "preempted"
    assert 6 <= run.steps()[-1] < 40
    done = project.start([*argv, "stopped"]).wait()
    assert done.code == 0, done.said
    assert run.values() == project.run("whole").values()
    assert run.adapter() == project.run("whole").adapter()


def test_convolutions_are_refused_by_check_and_by_the_run(project: Project) -> None:
    tiny_model_dir(project.root / "lfm2", "lfm2")
    recipe = project.recipe("lfm2.yaml", name="lfm2", **RECIPE, model__path="lfm2")
    for done in (project.trainer("check", recipe, "--shape", "split.yaml"),
                 project.worker(recipe, "--shape", "split.yaml", "--name", "lfm2")):  # fmt: skip
        assert done.code == 2, done.said
        assert "split splits packs over several ranks (context_parallel), which needs packed attention" in done.stderr
        assert "lfm2 keeps state between packed sequences" in done.stderr
