"""FSDP2 on two gloo ranks computes what one whole model does: learning, runs, checkpoints on other numbers of ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from project import Project, Run, Running
from tiny import tiny_model_dir

RANKS: Final = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
RECIPE: Final[dict[str, Any]] = {
    "steps": 12, "eval_interval": 4, "dcp_save_interval": 4, "optimizer__schedule": "constant",
    "optimizer__learning_rate": 1e-3, "rows_per_step": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    """Two shapes of two ranks, and one of one; a model of each architecture."""
    limit = {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}
    shape = {
        "name": "sharded", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16, "sharding": "full",
        "micro_batch_tokens": 256, "accelerate": "cpu", "limits": {"lora": limit, "full": limit},
    }  # fmt: skip
    (shared.root / "sharded.yaml").write_text(json.dumps(shape))
    for arch in ("llama", "qwen3", "mixtral"):
        tiny_model_dir(shared.root / arch, arch)
    return shared


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", "lora"), ("qwen3", "lora"), ("mixtral", "lora"), ("llama", "full"), ("qwen3", "full checkpointing")],
)
def test_rft_learns_the_same_numbers(project: Project, arch: str, kind: str) -> None:
    script = Path(__file__).with_name("sharded_ranks.py")
    paths = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = project.start([*RANKS, str(script), arch, *kind.split()], {"PYTHONPATH": paths}).wait()
    assert done.code == 0, done.said
    found = json.loads(done.stdout)
    for step, metrics in enumerate(found["metrics"]):
        for name, (ours, theirs) in metrics.items():
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), f"{name} of step {step}"
    assert found["distance"] < 3e-5  # float32 rounding; 1.3e-5 for mixtral on a CPU with AMX
    assert found["is_base_sharded"], "and not silently whole"
    assert found["num_sharded_adapters"] == 0
    assert found["num_masters"] > 0
    if kind == "lora":
        assert found["held"] == found["whole"]
    else:
        assert found["held"] < 0.6 * found["whole"], "each rank has about half of the masters and of the optimizer"


def start(project: Project, recipe: str, name: str) -> Running:
    return project.start([*RANKS, "-m", "trainer.worker", recipe, "--shape", "sharded.yaml", "--name", name])


def assert_close(ours: Run, theirs: Run) -> None:
    assert ours.steps() == theirs.steps()
    for record, other in zip(ours.values(), theirs.values(), strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_goes_from_two_sharded_ranks_to_one_and_back(project: Project, kind: str) -> None:
    full = {"lora": None} if kind == "full" else {}
    recipe = project.recipe(f"{kind}.yaml", name=kind, **RECIPE, **full)
    alone = project.worker(recipe, "--name", f"{kind}_alone")
    assert alone.code == 0, alone.said
    first = project.recipe(f"{kind}_4.yaml", name=kind, **RECIPE | {"steps": 4}, **full)
    second = project.recipe(f"{kind}_8.yaml", name=kind, **RECIPE | {"steps": 8}, **full)
    done = start(project, first, f"{kind}_moved").wait()
    assert done.code == 0, done.said
    done = project.worker(second, "--name", f"{kind}_moved")
    assert done.code == 0, done.said
    done = start(project, recipe, f"{kind}_moved").wait()
    assert done.code == 0, done.said
    run = project.run(f"{kind}_moved")
    assert [attempt["ranks"] for attempt in run.attempts()] == [2, 1, 2]
    assert_close(run, project.run(f"{kind}_alone"))
    weights = "adapter" if kind == "lora" else "model"
    assert (run.root / weights).is_dir()
    assert (run.root / f"{weights}-best").is_dir()
    if kind == "full":
        from safetensors.torch import load_file

        ours, theirs = (
            load_file(project.run(f"full_{name}").root / "model" / "model.safetensors") for name in ("moved", "alone")
        )
        assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in theirs)


def test_sharded_rft_with_the_local_sampler_is_refused(project: Project) -> None:
    (project.root / "rewards.py").write_text("def zero(completion, row):\n    return 0.0\n")
    rewards = [{"use": "rewards.py:zero"}]
    recipe = project.recipe("local.yaml", name="local", method="rft", rewards=rewards, rollout__max_completion_tokens=8)
    done = project.trainer("check", recipe, "--shape", "sharded.yaml")
    assert (done.code, done.stdout) == (2, "")
    assert "rollout.sampler: vllm" in done.stderr
