"""A model of images and text trains its language part on text, as the class that its config.json names."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import HIDDEN, VOCAB_SIZE, tiny_tokenizer

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError
from trainer.model.adapted_layers import refuse_lost
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy

CPU = torch.device("cpu")
LENGTHS = (12, 5, 9)
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL, whose rotary embedding has three positions for each token."""
    path = tmp_path_factory.mktemp("qwen3_vl")
    vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(text_config=TEXT, vision_config=vision, tie_word_embeddings=False)
    config.dtype = "float32"
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(15.0)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def load(path: Path, lora: LoraSettings | None) -> Policy:
    return load_policy(ModelSettings(path=str(path), compute_dtype="float32"), lora, 0, CPU)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()) for length in LENGTHS]
    return Batch.pack([TokenSequence(ids, (True,) * len(ids)) for ids in rows], CPU)


@torch.no_grad()
def plain_logprobs(model: torch.nn.Module) -> torch.Tensor:
    """By the model's own forward pass, each sequence alone."""
    found = []
    for ids in make_batch().token_ids.split(LENGTHS):
        scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(scores.gather(1, ids[1:, None]).squeeze(1))
    return torch.cat(found)


def plain(path: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()


def test_adapters_are_in_the_language_part_only_and_all_of_them_learn(model_dir: Path) -> None:
    policy = load(model_dir, LoraSettings(rank=2))
    trained = policy.trained_parameters()
    policy(make_batch()).logprobs.sum().backward()
    assert trained
    assert all(".language_model.layers." in name for name in trained)
    assert all(value.grad is not None and value.grad.any() for name, value in trained.items() if "lora_B" in name)


def test_logprobs_of_text_are_those_of_plain_transformers(tmp_path: Path, model_dir: Path) -> None:
    policy = load(model_dir, LoraSettings(rank=2))
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.add_(0.05)
        ours = policy(make_batch()).logprobs
    policy.save(tmp_path, dict(policy.trained_parameters()))
    torch.testing.assert_close(ours, plain_logprobs(PeftModel.from_pretrained(plain(model_dir), str(tmp_path))))


def test_full_training_leaves_the_vision_tower_as_it_is_and_saves_it(tmp_path: Path, model_dir: Path) -> None:
    policy = load(model_dir, None)
    trained = policy.trained_parameters()
    assert not [name for name in trained if "visual" in name]
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.01)
        ours = policy(make_batch()).logprobs
    policy.save(tmp_path, dict(trained))
    before, after = (load_file(path / "model.safetensors") for path in (model_dir, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) == ("visual" in name) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3VLForConditionalGeneration"]
    torch.testing.assert_close(ours, plain_logprobs(plain(tmp_path)))


def test_an_adapter_that_peft_would_lose_when_it_loads_it_is_refused() -> None:
    """PEFT takes Laguna's `shared_experts` for the `shared_expert` of its checkpoints, and renames them."""
    sizes = {**TEXT, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "rope_parameters": None}
    sizes |= {"layer_types": ["full_attention"] * 2, "num_attention_heads_per_layer": [4, 4], "num_experts": 4}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = transformers.LagunaForCausalLM(transformers.LagunaConfig(**sizes))
    for targets, is_lost in ((["q_proj"], False), (["q_proj", "shared_experts.down_proj"], True)):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))
        trained = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
        with pytest.raises(ModelError, match=r"shared_experts.*and 1 more tensors") if is_lost else nullcontext():
            refuse_lost(adapted, "default", trained)
