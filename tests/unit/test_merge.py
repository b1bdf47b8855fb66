"""Which adapters can be merged into their base."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM

from trainer.errors import ModelError
from trainer.export.merge import refuse_shared_weights


def test_layers_that_share_a_weight_cannot_be_merged(tmp_path: Path) -> None:
    """As in Zamba2, whose blocks are shared by several layers with an adapter each."""
    tiny_model_dir(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    refuse_shared_weights(get_peft_model(base, LoraConfig(target_modules=["down_proj"])))
    tied = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = (tied.model.layers[number].mlp.down_proj for number in (0, 1))
    second.weight = first.weight
    with pytest.raises(
        ModelError, match=r"model.layers.0.mlp.down_proj and model.layers.1.mlp.down_proj share one weight"
    ):
        refuse_shared_weights(get_peft_model(tied, LoraConfig(target_modules=["down_proj"])))
