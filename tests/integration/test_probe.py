"""The probe before step 1: it changes no bit, and what does not fit is said in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project import Project
from rft_project import NO_EVALUATION, prepare, run_here

from trainer.data.chat import load_tokenizer
from trainer.distributed.world import World
from trainer.model.policy import load_policy
from trainer.planning.plan import RFTPlan
from trainer.run.directory import RunDir
from trainer.sampling.local import LocalSampler
from trainer.training.memory_preflight import probe_sampling
from trainer.training.rollouts import sampling_params

ON: dict[str, Any] = {"recovery__probe_memory": "on"}
LIMITED = """
import resource, sys
from pathlib import Path
import torch
from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan
from trainer.distributed.world import World
from trainer.errors import ShapeError
from trainer.training.learner import Learner
from trainer.model.policy import load_policy
from trainer.training.memory_preflight import probe_memory

plan = make_plan(load_recipe(Path("recipe.yaml")))
world = World(0, 1, torch.device("cpu"))
policy = load_policy(plan.recipe.model, plan.recipe.lora, 0, world.device)
learner = Learner(policy, world)
smaller = plan.shape.model_copy(update={"micro_batch_tokens": 512})
probe_memory(learner, plan.model_copy(update={"shape": smaller}))
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**27, size + 2**27))
try:
    probe_memory(learner, plan)
except ShapeError as error:
    print(error)
    assert not any(master.grad.any() for master in learner.masters.values())
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("lora", [{"rank": 4, "dropout": 0.1}, None], ids=["dropout", "full"])
def test_sft_is_equal_with_and_without(project: Project, lora):
    runs = []
    for name, changes in (("plain", {}), ("probed", ON)):
        runs.append(run_here_sft(project, name, lora=lora, **changes))
    assert runs[0].values() == runs[1].values()
    weights = "adapter/adapter_model.safetensors" if lora else "model/model.safetensors"
    assert (runs[0].root / weights).read_bytes() == (runs[1].root / weights).read_bytes()


def run_here_sft(project: Project, name: str, **changes):
    base: dict[str, Any] = {"method": "sft", "data": {"train": "train.jsonl", "max_seq_tokens": 128}}
    base |= {"rows_per_step": 4, "steps": 2}
    empty: dict[str, Any] = {"algorithm": None, "rollout": None, "rewards": [], "eval_interval": 0}
    return run_here(project, name, **base, **empty, **changes)


def test_rft_is_equal_with_and_without_and_the_journal_does_not_see_it(project: Project):
    prepare(project)
    runs = [
        run_here(project, name, steps=2, **NO_EVALUATION, **changes)
        for name, changes in (("plain", {}), ("probed", ON))
    ]
    assert runs[0].values() == runs[1].values()
    assert runs[0].adapter() == runs[1].adapter()
    journals = [sorted(file.name for file in run.root.glob("rollouts/*/*")) for run in runs]
    assert journals[0] == journals[1]


def test_what_was_sampled_once_is_not_sampled_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The completions end with the last growth of the cache; another shape is probed again."""
    prepare(project)
    rollout = {"group_size": 2, "max_completion_tokens": 100, "chunk_prompts": 2}
    changes: dict[str, Any] = {"rollout": rollout, "data": {"train": "prompts.jsonl", "max_seq_tokens": 300}}
    run = run_here(project, "probed", steps=1, **{**NO_EVALUATION, **changes, **ON})
    plan = RunDir(run.root).read_plan()
    assert isinstance(plan, RFTPlan)
    monkeypatch.chdir(project.root)
    world, tokenizer = World(0, 1, torch.device("cpu")), load_tokenizer(plan.recipe.model)
    policy = load_policy(plan.recipe.model, plan.recipe.lora, 0, world.device)
    sampler = LocalSampler(policy, tokenizer)
    assert sampler.note is None
    drawn: list[int] = []
    sample = sampler.sample

    def counted(requests: Any, params: Any) -> Any:
        completions = sample(requests, params)
        drawn.extend(len(each.token_ids) for of_prompt in completions for each in of_prompt)
        return completions

    monkeypatch.setattr(sampler, "sample", counted)
    params = sampling_params(plan.recipe, plan.recipe.rollout, frozenset({2}))
    probe_sampling(sampler, params, plan, policy, world, RunDir(run.root))
    assert drawn == []  # the run's own attempt has done it
    other = plan.model_copy(update={"shape": plan.shape.model_copy(update={"name": "other"})})
    probe_sampling(sampler, params, other, policy, world, RunDir(run.root))
    assert drawn == [66] * 4  # 64 tokens fit at first; the 65th, of which the 66th is drawn, makes the cache grow
    probe_sampling(sampler, params, other, policy, world, RunDir(run.root))
    assert len(drawn) == 4


def test_what_does_not_fit_is_said_in_words(project: Project):
    changes: dict[str, Any] = {"rows_per_step": 128, "steps": 1, "shape": "shape.yaml"}
    project.recipe(**changes, **ON)
    limit = {"max_params_b": 9, "max_seq_tokens": 4096, "basis": "estimated"}
    shape = {"name": "here", "device": "cpu", "device_name": "CPU", "gpus": 0, "gpu_memory_gib": 4}
    shape |= {"micro_batch_tokens": 16384, "limits": {"lora": limit, "full": limit}, "accelerate": "cpu"}
    (project.root / "shape.yaml").write_text(json.dumps(shape))
    file = Path(project.root) / "limited.py"
    file.write_text(LIMITED)
    done = subprocess.run([sys.executable, str(file)], cwd=project.root, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    first, *ways = done.stdout.splitlines()
    assert first.startswith("out of memory before step 1: the longest micro-batch (16,384 tokens) does not fit.")
    assert "The shape here has 4 GiB per device" in first
    assert "were predicted" in first
    assert any("`micro_batch_tokens: 8192`" in way for way in ways)
