"""AdamW with moments in 8 bits, by bitsandbytes itself: what it keeps, saves and restores, and where it is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from small_recipe import SFT, write_small
from tiny import ComputeDtype, tiny_model_dir

from trainer.checkpoints.local import Checkpoints, TrainState
from trainer.config.load import load_recipe
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.errors import ModelError
from trainer.model.batch import Batch
from trainer.model.policy import load_policy
from trainer.planning.identity import identity_hash, make_identity
from trainer.planning.memory import moment_bytes
from trainer.run.directory import RunDir
from trainer.training.learner import Learner, Update
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

CPU = torch.device("cpu")
ADAM = AdamParams(1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2")


def learner_of(model_dir: Path, *, lora: bool, dtype: ComputeDtype = "float32") -> Learner:
    """Rank 128: most matrices of the adapter have 4,096 values or more, the fewest that are kept in 8 bits."""
    settings = LoraSettings(rank=128) if lora else None
    policy = load_policy(ModelSettings(path=str(model_dir), compute_dtype=dtype), settings, 0, CPU)
    return Learner(policy, World(0, 1, CPU), optimizer="adamw_8bit")


def pack(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = tuple(torch.randint(3, 300, (24,), generator=generator).tolist())
    return Batch.pack([TokenSequence(tokens, (False,) + (True,) * 23, TokenInputs(weights=(1.0,) * 23))], CPU)


def update(learner: Learner, seed: int) -> Update:
    return learner.learn([pack(seed)], sft_loss, ADAM, denominator=23.0)


def test_moments_take_two_bytes_a_parameter_as_the_estimate_says(model_dir, tmp_path, monkeypatch):
    learner = learner_of(model_dir, lora=True)
    update(learner, 0)
    kept = {name: each for name, each in learner.state_tensors().items() if name.startswith("optimizer/")}
    large = {name for name, master in learner.masters.items() if master.numel() >= 4096}
    kept = {name: each for name, each in kept.items() if name.split("/")[1] in large}
    assert len(kept) == 4 * len(large) > 0
    assert {each.dtype for name, each in kept.items() if "state" in name} == {torch.uint8}
    num_bytes = sum(each.numel() * each.element_size() for each in kept.values())
    num_trained = sum(learner.masters[name].numel() for name in large)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_small(tmp_path, SFT), ["optimizer.name=adamw_8bit"]).recipe
    assert moment_bytes(recipe) == 2.03125
    assert num_bytes == num_trained * moment_bytes(recipe)


def test_small_parameters_keep_their_moments_in_float32(model_dir):
    learner = learner_of(model_dir, lora=False)
    update(learner, 0)
    for name, master in learner.masters.items():
        dtype = torch.uint8 if master.numel() >= 4096 else torch.float32
        assert learner.state_tensors()[f"optimizer/{name}/state1"].dtype == dtype
    assert {master.numel() >= 4096 for master in learner.masters.values()} == {True, False}


def test_it_learns_about_as_adamw_does(model_dir):
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        learner = learner_of(model_dir, lora=True)
        if name == "adamw":
            learner = Learner(learner.policy, learner.world)
        losses[name] = [update(learner, 0).metrics["loss"] for _ in range(8)]
    assert losses["adamw_8bit"][0] == losses["adamw"][0]
    assert losses["adamw_8bit"][1] == pytest.approx(losses["adamw"][1], rel=1e-3)
    assert losses["adamw_8bit"][-1] < 0.7 * losses["adamw_8bit"][0]
    assert losses["adamw_8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.1)


@pytest.mark.parametrize(
    ("lora", "dtype"), [(True, "float32"), (True, "bfloat16"), (False, "bfloat16")], ids=["lora", "lora-bf16", "full"]
)
def test_a_checkpoint_restores_it_to_the_bit(model_dir, tmp_path, monkeypatch, lora, dtype):
    """Through DCP's files: the updates after a resume are those of a run that went on."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_small(tmp_path, SFT), []).recipe
    (tmp_path / "run").mkdir()

    def checkpoints() -> Checkpoints:
        return Checkpoints(RunDir(tmp_path / "run"), recipe, "ours", World(0, 1, CPU), 0)

    learner = learner_of(model_dir, lora=lora, dtype=dtype)
    for seed in range(3):
        update(learner, seed)
    saving = checkpoints()
    saving.begin(TrainState(3, {"updates": learner.updates}), learner.state_tensors())
    saved = saving.collect(wait=True)
    assert saved is not None
    assert saved.problem is None
    saving.close(10.0)
    expected = [update(learner, seed) for seed in range(3, 6)]

    resumed = learner_of(model_dir, lora=lora, dtype=dtype)
    state = checkpoints().load_newest(resumed.state_tensors())
    assert state is not None
    resumed.restore(updates=int(state.counters["updates"]))
    assert [update(resumed, seed) for seed in range(3, 6)] == expected
    ours, theirs = resumed.state_tensors(), learner.state_tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], each) for name, each in theirs.items())


def test_a_missing_package_is_named_with_its_extra(model_dir, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ModelError, match=r"adamw_8bit needs bitsandbytes; install the extra: .*tunesmith\[qlora\]"):
        learner_of(model_dir, lora=True)


def test_the_kind_is_part_of_a_runs_identity_and_adamw_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_small(tmp_path, SFT)

    def identity(*changes: str) -> dict[str, Any]:
        return make_identity(load_recipe(file, list(changes)).recipe, None)

    plain, named, other = identity(), identity("optimizer.name=adamw"), identity("optimizer.name=adamw_8bit")
    assert "name" not in plain["optimizer"]
    assert plain == named
    assert other["optimizer"]["name"] == "adamw_8bit"
    assert identity_hash(other) != identity_hash(plain)
