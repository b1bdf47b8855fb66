"""The estimate's parts, written out; the constants it shares with the code; remedies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from small_recipe import RFT, SFT, write_small
from tiny import tiny_model

from trainer.config.load import find_shape, load_recipe
from trainer.config.recipe import LoraSettings
from trainer.config.shape import TrainingShape
from trainer.model import attention, kv_cache, lm_head
from trainer.model.adapters import RUN_ADAPTER, Adapters
from trainer.planning import activations, memory
from trainer.planning.activations import Pass
from trainer.planning.longest_pack import longest_pack
from trainer.planning.model_facts import ADAPTED_EXPERTS, ModelFacts
from trainer.planning.remedies import find_remedies
from trainer.sampling import fused


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe_of(text: str, *overrides: str):
    return load_recipe(write_small(Path(), text), overrides).recipe


def shape_of(**changes: Any) -> TrainingShape:
    return find_shape("cpu").model_copy(update=changes)


FACTS = ModelFacts(
    hidden=100, layers=3, query_width=80, key_width=40, intermediate=200, vocab=1000, is_tied=True, heads=8
)
SMALL_MIXTURE = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 100,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
}  # fmt: skip


def test_constants_are_those_of_the_code():
    assert activations.EAGER_MAX_TOKENS == attention.EAGER_MAX_TOKENS
    for name in ("TILE_CELLS", "GPU_TILE_ROWS", "CPU_BLOCK_ROWS"):
        assert getattr(activations, name) == getattr(lm_head, name), name
    assert memory.FIRST_ROOM == kv_cache.INITIAL_CAPACITY
    assert memory.FUSED_FAMILIES == fused.FAMILIES


@pytest.mark.parametrize(
    ("overrides", "shape", "lengths"),
    [
        (["data.max_seq_tokens=256", "rows_per_step=64"], {}, [256] * 4),  # 1,024 tokens a micro-batch
        (["data.max_seq_tokens=300", "rows_per_step=64"], {}, [300] * 3 + [124]),  # the rest is filled
        (["data.max_seq_tokens=300", "rows_per_step=2"], {}, [300] * 2),  # a step has no more rows
        (["data.max_seq_tokens=2000", "rows_per_step=64"], {}, [2000]),  # longer than the budget: alone
        (["data.max_seq_tokens=256", "rows_per_step=4"], {"gpus": 4}, [256]),  # one row for each rank
        # two rows for each group of two ranks, in a pack of 2,048 tokens
        (["data.max_seq_tokens=256", "rows_per_step=4"], {"gpus": 4, "context_parallel": 2}, [256] * 2),
        (["data.max_seq_tokens=600", "rows_per_step=8"], {"gpus": 2, "context_parallel": 2}, [600] * 3 + [248]),
    ],
)
def test_longest_pack(overrides, shape, lengths):
    assert longest_pack(recipe_of(SFT, *overrides), shape_of(**shape)) == lengths


def test_minibatches_of_rft_have_fewer_sequences():
    recipe = recipe_of(RFT, "rows_per_step=2", "algorithm.minibatches_per_step=2")
    assert longest_pack(recipe, shape_of()) == [128] * 4  # 2 prompts x 4 completions / 2


def test_a_block_keeps_what_its_operations_save():
    micro = Pass(FACTS, [400], 400, 2, 4, is_cpu=True)
    norms = 2 * 100 * (2 + 2)
    read = (80 + 2 * 40 + 2 * 80) * 2  # q, k, v; the kernel's output and its copy
    mlp = 4 * 200 * 2
    adapters = 7 * 4 * 2
    assert micro.block() == 400 * (norms + read + mlp + adapters)


def test_short_sequences_keep_their_scores_on_a_cpu_only():
    long, short = (Pass(FACTS, [length], 8, 2, 4, is_cpu=True) for length in (385, 384))
    on_gpu = Pass(FACTS, [384], 8, 2, 4, is_cpu=False)
    scores = 384 * 384 * 8 * 2
    assert short.block() - on_gpu.block() == scores - 384 * 80 * 2  # and no second copy of the output
    assert long.block() / 385 == on_gpu.block() / 384
    capped = Pass(ModelFacts(**{**FACTS.__dict__, "has_eager_attention": True}), [385], 8, 2, 4, is_cpu=True)
    assert capped.block() > long.block()


def test_a_slice_keeps_its_own_tokens_and_the_keys_of_all():
    alone, half = (Pass(FACTS, [800], 400, 2, 4, is_cpu=False, ranks=ranks) for ranks in (1, 2))
    assert (alone.tokens, half.tokens) == (800, 400)
    keys = 2 * 40 * 2  # keys and values of a token
    assert half.block() == alone.block() / 2 + 400 * keys, "the other half of the keys and values too"
    assert half.kept(recomputed=True) == alone.kept(recomputed=True) / 2
    wide = ModelFacts(**{**FACTS.__dict__, "key_width": 400})
    backward = [
        Pass(wide, [800], 400, 2, 4, is_cpu=False, ranks=ranks).moments(recomputed=False)["backward of a block"]
        for ranks in (1, 2)
    ]
    assert backward[0] == 800 * (100 + 2 * 200) * 2
    assert backward[1] == 800 * 2 * 400 * (2 + 4 + 2), "gradients of all keys and values, in bfloat16 and in float32"


def test_checkpointing_keeps_one_block_and_inputs():
    micro = Pass(FACTS, [400], 400, 2, 4, is_cpu=True)
    assert micro.kept(recomputed=True) == 3 * 400 * 100 * 2
    plain, checkpointed = micro.moments(recomputed=False), micro.moments(recomputed=True)
    assert checkpointed["backward of a block"] - plain["backward of a block"] == micro.block()


def test_a_tied_head_waits_with_its_gradient():
    tied = Pass(FACTS, [400], 8, 2, None, is_cpu=True)
    untied = Pass(ModelFacts(**{**FACTS.__dict__, "is_tied": False}), [400], 8, 2, None, is_cpu=True)
    last = "backward of the last norm"
    assert tied.moments(recomputed=False)[last] - untied.moments(recomputed=False)[last] == 1000 * 100 * 2


def test_checkpoint_copies_are_in_the_hosts_memory():
    recipe = recipe_of(SFT)
    trained = FACTS.lora_params(recipe.lora)
    on_cpu = memory.estimate_memory(recipe, shape_of(), FACTS)
    on_gpu = memory.estimate_memory(recipe, find_shape("h100x1"), FACTS)
    assert on_cpu.parts["copies for checkpoints"] == trained * 12 / 2**30
    assert "copies for checkpoints" not in on_gpu.parts
    assert "copies for checkpoints" not in on_gpu.parts
    never = memory.estimate_memory(recipe_of(SFT, "dcp_save_interval=0"), shape_of(), FACTS)
    assert "copies for checkpoints" not in never.parts


def test_weights_stored_in_another_dtype_are_there_twice_while_loading():
    stored = ModelFacts(**{**FACTS.__dict__, "vocab": 10_000_000, "stored_bytes": 4})
    estimate = memory.estimate_memory(recipe_of(SFT, "model.gradient_checkpointing=true"), shape_of(), stored)
    assert estimate.phases["loading"] == pytest.approx(stored.params * 6 / 2**30)
    assert estimate.parts.keys() == {"base weights", "weights as stored", "process"}


def big(**sizes: Any) -> ModelFacts:
    config = json.loads((Path("model") / "config.json").read_text())
    card = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    facts = ModelFacts.from_config({**config, **card, "intermediate_size": 14336, "vocab_size": 128256, **sizes})
    assert facts is not None
    return facts


def test_remedies_fit_and_the_next_smaller_change_does_not():
    recipe = recipe_of(SFT, "data.max_seq_tokens=1024", "rows_per_step=12")
    shape = find_shape("h100x1").model_copy(update={"gpu_memory_gib": 30})
    facts = big(tie_word_embeddings=False)
    assert not memory.estimate_memory(recipe, shape, facts).fits
    found = find_remedies(recipe, shape, facts, [shape, find_shape("h100x1"), find_shape("h200x1")])
    changes = [remedy.change for remedy in found]
    assert changes[0] == "`model.gradient_checkpointing: true`"
    halved = next(change for change in changes if "micro_batch_tokens" in change)
    tokens = int(halved.split("`")[1].split(": ")[1])
    fits = [
        memory.estimate_memory(recipe, shape.model_copy(update={"micro_batch_tokens": each}), facts).fits
        for each in (tokens, 2 * tokens)
    ]
    assert fits == [True, False]
    assert changes[-1].startswith("`--shape h200x1`")
    assert all(memory.estimate_memory(remedy.recipe, remedy.shape, facts).fits for remedy in found)


def test_remedies_of_full_parameters_name_the_adapter():
    recipe = recipe_of(SFT, "lora=null", "data.max_seq_tokens=1024")
    changes = [str(remedy) for remedy in find_remedies(recipe, find_shape("h100x1"), big(), [find_shape("h200x16")])]
    assert any(change.startswith("`lora: {}` instead of full-parameter training: ") for change in changes)
    assert any("h200x16`, which shards the base model" in change for change in changes)


def test_other_norms_keep_float32_and_norms_behind_a_layer_keep_their_input():
    def kept(**changes: Any) -> float:
        return Pass(ModelFacts(**{**FACTS.__dict__, **changes}), [400], 8, 2, 4, is_cpu=True).block() / 400

    assert kept(has_fused_norms=False) - kept() == 2 * 100 * (4 - 2)
    assert kept(model_type="glm4") - kept() == 2 * 100 * 2


def test_experts_that_peft_leaves_alone_have_no_adapter():
    config = {**SMALL_MIXTURE, "model_type": "qwen3_moe"}
    adapted, left = ModelFacts.from_config(config), ModelFacts.from_config({**config, "model_type": "qwen2_moe"})
    assert adapted is not None
    assert left is not None
    lora = LoraSettings(rank=4)
    attention_only = 2 * 4 * sum(i + o for _, i, o in left.attention_linears())
    assert left.lora_params(lora) == attention_only < adapted.lora_params(lora)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # PEFT's own, of experts that it does adapt
@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt_oss", "qwen2_moe", "gemma4_text"])
def test_adapter_parameters_are_those_that_peft_makes(arch: str) -> None:
    model = tiny_model(arch)
    facts = ModelFacts.from_config(model.config.to_dict())
    assert facts is not None
    lora = LoraSettings(rank=4)
    adapters = Adapters(model)
    adapters.add(RUN_ADAPTER, lora, 0)
    made = sum(value.numel() for value in adapters.parameters(RUN_ADAPTER).values())
    once = 4 * (facts.hidden + facts.layers * facts.per_layer_width) if facts.per_layer_width else 0
    routers = 2 * 4 * (facts.hidden + 1) if arch == "qwen2_moe" else 0  # of the shared expert, negligible
    assert facts.lora_params(lora) + once + routers == made


def test_gpt_oss_adapts_attention_only() -> None:
    config = {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "head_dim": 64, "num_key_value_heads": 8, "intermediate_size": 2880, "vocab_size": 201_088,
        "num_local_experts": 32, "num_experts_per_tok": 4,
    }  # fmt: skip
    facts = ModelFacts.from_config(config)
    assert facts is not None
    assert facts.lora_params(LoraSettings(rank=16)) == 24 * 16 * (2 * (2880 + 4096) + 2 * (2880 + 512)) == 7_962_624
    assert facts.adapted_parts == "attention; the 32 experts of a block and the router get no adapter"
    mixed = ModelFacts.from_config({**config, "model_type": "qwen3_moe"})
    assert mixed is not None
    assert mixed.adapted_parts == "attention, router and the 32 experts of a block"


def test_adapted_experts_are_those_of_the_installed_peft() -> None:
    known = {name for name, base in _MODEL_TO_CONVERSION_PATTERN.items() if base in _MOE_TARGET_MODULE_MAPPING}
    assert {name for name in known if name.islower()} == ADAPTED_EXPERTS


def test_embeddings_of_each_block_are_counted() -> None:
    model = tiny_model("gemma4_text")
    facts = ModelFacts.from_config(model.config.to_dict())
    assert facts is not None
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert facts.per_layer_params > 0.1 * actual
    assert abs(facts.params - actual) < 0.01 * actual


def test_over_several_turns_each_rollout_has_its_own_prompt_and_a_copy_of_it():
    recipe, facts = recipe_of(RFT), big()
    rows = min(recipe.rollout.chunk_prompts, recipe.rows_per_step) * recipe.rollout.group_size
    several = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"environment": "a.py:B"})})

    def caches(of: Any) -> float:
        return sum(
            value for name, value in memory._sampling(of, shape_of(), facts).items() if name.startswith("KV cache")
        )

    width = 2 * facts.layers * facts.key_width * memory.compute_bytes_of(recipe)
    prompt = recipe.data.max_seq_tokens - recipe.rollout.max_completion_tokens
    shared = rows // recipe.rollout.group_size
    assert (
        caches(several) - caches(recipe) == (rows - shared) * prompt * width + rows * recipe.data.max_seq_tokens * width
    )
