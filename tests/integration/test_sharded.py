"""FSDP2 on gloo ranks computes what one whole model does: learning, runs, checkpoints on other numbers of ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from project import Project, Run, Running
from tiny import tiny_model_dir

LAUNCH: Final = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
RANKS: Final = [*LAUNCH, "2"]
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
    copies = shape | {"name": "copies", "sharding": "node", "nodes": 2, "gpus": 4}
    (shared.root / "copies.yaml").write_text(json.dumps(copies))
    for arch in ("llama", "qwen3", "mixtral"):
        tiny_model_dir(shared.root / arch, arch)
    for arch in ("llama", "qwen2"):  # FlexAttention needs heads of 16
        tiny_model_dir(shared.root / f"{arch}_16", arch, head_dim=16)
    return shared


@pytest.mark.parametrize(
    ("arch", "kind", "ranks"),
    [
        ("llama", "lora", 2), pytest.param("qwen3", "lora", 2, marks=pytest.mark.heavy), ("mixtral", "lora", 2),
        ("llama", "full", 2), ("qwen3", "full checkpointing", 2),
        pytest.param("llama", "lora", 4, marks=pytest.mark.heavy), ("llama", "full", 4),
    ],
)  # fmt: skip
def test_rft_learns_the_same_numbers(project: Project, arch: str, kind: str, ranks: int) -> None:
    """Two shards: with two ranks of one copy of the model, with four of two copies."""
    found = ranks_learn(project, arch, kind, ranks)
    assert found["num_sharded_adapters"] == 0
    if "lora" in kind:
        assert found["held"] == found["whole"]
    else:
        assert found["held"] < 0.6 * found["whole"], "each rank has about half of the masters and of the optimizer"


@pytest.mark.parametrize(
    ("arch", "kind", "ranks"),
    [
        pytest.param("llama_16", "lora compiled", 2, marks=pytest.mark.heavy),
        ("qwen2_16", "lora compiled-checkpointing", 2),
        pytest.param("llama_16", "full compiled", 4, marks=pytest.mark.heavy),
        pytest.param("llama_16", "full compiled-selective", 2, marks=pytest.mark.heavy),
    ],
)  # fmt: skip
def test_compiled_layers_learn_the_numbers_of_a_whole_uncompiled_model(
    project: Project, arch: str, kind: str, ranks: int
) -> None:
    """The compiler's back end runs its graphs as they are; qwen2 has biases. The reference has no adapter."""
    found = ranks_learn(project, arch, kind, ranks)
    assert 1 <= found["num_graphs"] <= 5
    assert found["problem"] is None
    assert found["breaks"] == 0
    groups = [3, 2] * 2 if "lora" in kind else []
    assert sorted(found["groups"]) == sorted(groups), "of two layers; each with the weights of its members"


def ranks_learn(project: Project, arch: str, kind: str, ranks: int) -> dict[str, Any]:
    """What the ranks of sharded_ranks.py print, after the checks that hold for all of them."""
    script = Path(__file__).with_name("sharded_ranks.py")
    paths = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = project.start([*LAUNCH, str(ranks), str(script), arch, *_words(kind)], {"PYTHONPATH": paths}).wait()
    assert done.code == 0, done.said
    found: dict[str, Any] = json.loads(done.stdout)
    for step, metrics in enumerate(found["metrics"]):
        for name, (ours, theirs) in metrics.items():
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), f"{name} of step {step}"
    assert found["distance"] < 3e-5  # float32 rounding; 1.3e-5 for mixtral on a CPU with AMX
    assert found["is_layer_sharded"], "and not silently whole"
    assert found["is_head_sharded"] == ("full" in kind), "a frozen head is whole: it would be gathered all the time"
    assert found["num_masters"] > 0
    return found


def _words(kind: str) -> list[str]:
    method, *rest = kind.split()
    return [method, "2", *rest]


def start(project: Project, recipe: str, name: str) -> Running:
    return project.start([*RANKS, "-m", "trainer.worker", recipe, "--shape", "sharded.yaml", "--name", name])


def assert_close(ours: Run, theirs: Run) -> None:
    assert ours.steps() == theirs.steps()
    for record, other in zip(ours.values(), theirs.values(), strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.heavy), "full"])
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


def test_sharded_ranks_with_unequal_numbers_of_packs_do_not_wait_for_each_other(project: Project) -> None:
    """One row a step: the other rank has none, in training and in evaluation."""
    recipe = project.recipe("one.yaml", name="one", **RECIPE | {"steps": 2, "rows_per_step": 1, "eval_interval": 1})
    done = start(project, recipe, "one_sharded").wait()
    assert done.code == 0, done.said
    done = project.worker(recipe, "--name", "one_alone")
    assert done.code == 0, done.said
    assert_close(project.run("one_sharded"), project.run("one_alone"))


def test_a_run_goes_from_two_sharded_copies_to_one_rank(project: Project) -> None:
    """Both copies save the same parts: the checkpoint holds each part once and loads on any number of ranks."""
    fields = RECIPE | {"steps": 6, "dcp_save_interval": 3, "eval_interval": 3, "lora": None}
    recipe = project.recipe("copies_6.yaml", name="copies", **fields)
    first = project.recipe("copies_3.yaml", name="copies", **fields | {"steps": 3})
    argv = [*LAUNCH, "4", "-m", "trainer.worker", first, "--shape", "copies.yaml", "--name", "copies_moved"]
    done = project.start(argv).wait()
    assert done.code == 0, done.said
    for name in ("copies_moved", "copies_alone"):
        done = project.worker(recipe, "--name", name)
        assert done.code == 0, done.said
    run = project.run("copies_moved")
    assert [attempt["ranks"] for attempt in run.attempts()] == [4, 1]
    assert_close(run, project.run("copies_alone"))


def test_sharded_rft_with_the_local_sampler_is_refused(project: Project) -> None:
    (project.root / "rewards.py").write_text("def zero(completion, row):\n    return 0.0\n")
    rewards = [{"use": "rewards.py:zero"}]
    recipe = project.recipe("local.yaml", name="local", method="rft", rewards=rewards, rollout__max_completion_tokens=8)
    done = project.trainer("check", recipe, "--shape", "sharded.yaml")
    assert (done.code, done.stdout) == (2, "")
    assert "rollout.sampler: vllm" in done.stderr
