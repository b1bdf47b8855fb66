"""A base in 4 bits: trains, repeats, samples; refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from project import Project
from rft_project import NO_EVALUATION, prepare, run_here

from trainer.config.load import load_recipe
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError, RecipeError
from trainer.model.batch import Batch
from trainer.model.lora_linear import FusedLinear
from trainer.model.policy import load_policy
from trainer.model.quantization import quantized_loading
from trainer.planning.memory import base_bytes
from trainer.planning.model_facts import find_model_facts

bitsandbytes = pytest.importorskip("bitsandbytes")
NF4 = {"path": "model", "compute_dtype": "float32", "quantization": "nf4"}
SFT: dict[str, Any] = {
    "method": "sft",
    "data": {"train": "train.jsonl", "max_seq_tokens": 128},
    "rows_per_step": 4,
    "steps": 8,
}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
EMPTY: dict[str, Any] = {"algorithm": None, "rollout": None, "rewards": [], "eval_interval": 0}


def test_sft_learns_and_repeats(project: Project):
    first, second = (run_here(project, name, model=NF4, **SFT, **EMPTY) for name in ("first", "second"))
    losses = [record["train/loss"] for record in first.metrics()]
    assert losses[-1] < 0.9 * losses[0]
    assert first.values() == second.values()
    assert first.adapter() == second.adapter()


def test_rft_samples_from_what_it_trains(project: Project):
    prepare(project)
    run = run_here(project, "rft", model=NF4, steps=2, algorithm={"minibatches_per_step": 1}, **NO_EVALUATION)
    assert run.metrics()[0]["train/ref_kld"] == 0.0
    assert all(record["train/sampler_kl"] < 1e-4 for record in run.metrics())


def test_linear_layers_are_bytes_and_adapters_are_peft_s_own(project: Project):
    settings = ModelSettings(path=str(project.root / "model"), compute_dtype="bfloat16", quantization="nf4")
    policy = load_policy(settings, LoraSettings(rank=4), 0, torch.device("cpu"))
    layer = policy.causal_lm.model.layers[0].self_attn.q_proj
    assert not isinstance(layer, FusedLinear)
    assert layer.base_layer.weight.dtype == torch.uint8
    assert {parameter.dtype for parameter in policy.trained_parameters().values()} == {torch.bfloat16}
    assert policy.causal_lm.get_output_embeddings().weight.dtype == torch.bfloat16
    frozen = [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    scales = [cast(Any, parameter).quant_state.absmax for parameter in frozen if parameter.dtype == torch.uint8]
    assert scales
    project.recipe(model=settings.model_dump())
    facts = find_model_facts(settings.path, [])
    assert facts is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        recipe = load_recipe(Path("recipe.yaml")).recipe
    assert sum(tensor.nbytes for tensor in (*frozen, *scales)) == base_bytes(recipe, facts)


def test_gradients_are_the_same_after_an_evaluation(project: Project):
    settings = ModelSettings(path=str(project.root / "model"), compute_dtype="bfloat16", quantization="nf4")
    policy = load_policy(settings, LoraSettings(rank=4), 0, torch.device("cpu"))
    tokens = tuple(range(3, 67))
    batch = Batch.pack([TokenSequence(tokens, (True,) * len(tokens))], torch.device("cpu"))

    def first_gradient() -> torch.Tensor:
        policy.zero_grad()
        policy.train()
        policy(batch).logprobs.sum().backward()
        gradient = policy.trained_parameters()[FIRST].grad
        assert gradient is not None
        return gradient.clone()

    before = first_gradient()
    with torch.inference_mode():
        policy.eval()(batch)
    assert before.abs().sum() > 0
    assert torch.equal(first_gradient(), before)


def test_a_device_without_backend_is_refused():
    with pytest.raises(ModelError, match=r"model.quantization: nf4: bitsandbytes .* has no backend for meta, only cpu"):
        quantized_loading(ModelSettings(path="model", quantization="nf4"), torch.device("meta"))


def test_full_parameters_are_refused(project: Project, monkeypatch):
    monkeypatch.chdir(project.root)
    project.recipe(lora=None, model__quantization="nf4")
    with pytest.raises(RecipeError, match=r"model.quantization: 4-bit weights cannot be trained; set `lora`"):
        load_recipe(Path("recipe.yaml"))
