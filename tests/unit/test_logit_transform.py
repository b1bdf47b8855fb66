"""The scale and the soft cap behind the LM head are those of the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trainer.errors import ModelError
from trainer.model.base_model import logit_transform

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "gemma2": {"final_logit_softcapping": 5.0},
    "nanochat": {"final_logit_softcapping": 5.0},
    "minicpm3": {
        "num_key_value_heads": 4,
        "dim_model_base": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "falcon_h1": {
        "lm_head_multiplier": 0.25,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transformed_products_of_the_head_are_the_models_logits(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})).eval()
    model.get_output_embeddings().weight.mul_(50.0)
    ids = torch.arange(3, 15)[None]
    transform = logit_transform(model)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden) * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits)
    assert (transform.scale, transform.softcap) != (1.0, None) or family == "llama"


def test_a_scale_that_transformers_leaves_out_is_refused() -> None:
    text = AutoConfig.for_model("cohere2", **SIZES, logit_scale=0.25, layer_types=["full_attention"])
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("cohere2_vision", text_config=text.to_dict(), vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ModelError, match=r"does not apply the logit_scale 0.25 of its language model"):
        logit_transform(model)
