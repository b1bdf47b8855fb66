"""A model that was trained with all parameters is saved as complete as its base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trainer.config.recipe import ModelSettings
from trainer.model.policy import load_policy

TOKENS = torch.arange(3, 25)[None]


def gemma4_with_scaled_layers(path: Path) -> Path:
    """A Gemma 4 whose `layer_scalar` buffers differ from their initial value, as those of the released models do."""
    model = tiny_model("gemma4_text", scale=1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.5)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def saved_untrained(base: Path, directory: Path) -> Path:
    policy = load_policy(ModelSettings(path=str(base), compute_dtype="float32"), None, 0, torch.device("cpu"))
    directory.mkdir()
    policy.save(directory, dict(policy.trained_parameters()))
    return directory


def test_a_saved_model_has_every_tensor_of_its_base(tmp_path: Path) -> None:
    base = gemma4_with_scaled_layers(tmp_path / "base")
    saved = saved_untrained(base, tmp_path / "saved")
    theirs, ours = (load_file(directory / "model.safetensors") for directory in (base, saved))
    assert any(name.endswith("layer_scalar") for name in theirs)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@torch.no_grad()
def test_a_saved_untrained_model_computes_what_its_base_does(tmp_path: Path) -> None:
    base = gemma4_with_scaled_layers(tmp_path / "base")
    saved = saved_untrained(base, tmp_path / "saved")
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path)(input_ids=TOKENS).logits for path in (base, saved))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_generation_settings_and_processor_are_saved_too(tmp_path: Path) -> None:
    base = gemma4_with_scaled_layers(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [2, 7]}))
    (base / "processor_config.json").write_text(json.dumps({"image_seq_length": 256}))
    saved = saved_untrained(base, tmp_path / "saved")
    settings = json.loads((saved / "generation_config.json").read_text())
    assert (settings["temperature"], settings["eos_token_id"]) == (0.6, [2, 7])
    assert (saved / "processor_config.json").read_text() == (base / "processor_config.json").read_text()
