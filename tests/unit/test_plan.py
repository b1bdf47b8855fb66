"""Plans: overrides and origins, identity, shapes, batch arithmetic, memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.config.document import dotted, leaves
from trainer.config.load import all_shapes, find_shape, load_recipe
from trainer.config.recipe import LoraSettings
from trainer.errors import RecipeError, ShapeError, UserError
from trainer.planning.fit import misfit
from trainer.planning.model_facts import ModelFacts
from trainer.planning.plan import Plan, RFTPlan, accumulation, make_plan, model_facts, parse_plan, step_tokens


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def mistakes_of(recipe: str, *overrides: str) -> list[str]:
    path = write_small(Path(), recipe)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.mistakes


def plan_of(recipe: str = SFT, *overrides: str, shape: str | None = None) -> Plan:
    return make_plan(load_recipe(write_small(Path(), recipe), overrides), shape)


def test_overrides_change_values_and_say_so():
    plan = plan_of(
        SFT,
        "optimizer.learning_rate=2e-4",
        "data.train=eval.jsonl",
        "data.eval=train.jsonl",
        "lora.target_modules=[q_proj, v_proj]",
        "lora.target_modules.1=k_proj",
        "lora.target_modules.2=o_proj",
        "model.gradient_checkpointing=true",
    )
    recipe, origins = plan.recipe, plan.origins
    assert recipe.optimizer.learning_rate == 2e-4
    assert recipe.data.train.path == "eval.jsonl"
    assert recipe.lora is not None
    assert recipe.lora.target_modules == ["q_proj", "k_proj", "o_proj"]
    assert origins["optimizer.learning_rate"] == "--set"
    assert origins["data.train.path"] == "--set"
    assert origins["data.train.hub"] == "default"
    assert origins["lora.target_modules"] == "--set"
    assert origins["model.gradient_checkpointing"] == "--set"
    assert origins["lora.rank"] == "recipe.yaml:6"
    assert origins["lora.alpha"] == "default"
    assert origins["shape"] == "recipe.yaml:18"
    assert origins["shape.micro_batch_tokens"] == "shape cpu"


def test_overriding_a_section_replaces_what_the_file_said_of_it():
    plan = plan_of(SFT, "lora={alpha: 8}")
    assert plan.recipe.lora is not None
    assert (plan.recipe.lora.rank, plan.recipe.lora.alpha) == (16, 8.0)
    assert (plan.origins["lora.rank"], plan.origins["lora.alpha"]) == ("default", "--set")


def test_lora_null_is_full_parameter_training():
    plan = plan_of(SFT, "lora=null")
    assert plan.recipe.lora is None
    assert plan.origins["lora"] == "--set"


def test_a_file_written_short_keeps_its_name_when_the_hub_is_set():
    train = plan_of(SFT, "data.train.hub=owner/rows").recipe.data.train
    assert (train.path, train.hub) == ("train.jsonl", "owner/rows")


def test_a_reward_can_be_appended():
    plan = plan_of(RFT, "rewards.1.use=exact_match", "rewards.1.weight=0.5")
    assert isinstance(plan, RFTPlan)
    assert [(reward.use, reward.weight) for reward in plan.recipe.rewards] == [
        ("last_number", 1.0),
        ("exact_match", 0.5),
    ]
    assert plan.origins["rewards.0.use"] == "recipe.yaml:17"
    assert plan.origins["rewards.1.use"] == "--set"


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("steps", "--set steps: expected key=value, for example optimizer.learning_rate=1e-4"),
        ("lora.rnak=3", "--set lora.rnak: unknown field; did you mean `rank`?"),
        ("lora.rank=0", "--set lora.rank: must be greater than 0 (got 0)"),
        ("rows_per_step.0=3", "--set rows_per_step.0=3: there is no rows_per_step.0; rows_per_step is 2, no list"),
        ("rewards.3.use=x", "--set rewards.3.use=x: there is no rewards.3.use; rewards is a list of 0"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(override, mistake):
    assert mistakes_of(SFT + "rewards: []\n", override) == [mistake]


def test_algorithm_values_come_from_the_preset_where_the_recipe_is_silent():
    plan = plan_of(RFT)
    assert isinstance(plan, RFTPlan)
    algorithm = plan.algorithm
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.overlong) == (0.1, 0.28, "mask")
    assert plan.origins["algorithm.clip_low"] == "recipe.yaml:12"
    assert plan.origins["algorithm.clip_high"] == "preset dapo"
    assert plan.origins["algorithm.overlong"] == "preset dapo"
    assert plan.origins["algorithm.epochs_per_batch"] == "default"
    assert plan.origins["rollout.temperature"] == "default"


def test_every_resolved_value_has_an_origin():
    for recipe in (SFT, RFT):
        plan = plan_of(recipe)
        assert {dotted(path) for path, _ in leaves(plan.recipe.model_dump())} <= plan.origins.keys()


def test_a_plan_survives_its_file():
    for recipe in (SFT, RFT):
        plan = plan_of(recipe)
        assert parse_plan(plan.dump()) == plan


@pytest.mark.parametrize(
    "override",
    [
        "steps=20",
        "eval_interval=2",
        "dcp_save_interval=7",
        "shape=h100x8",
        "name=other",
        "logging.wandb=offline",
        "keep_last=9",
    ],
)
def test_what_does_not_change_the_result_keeps_the_identity(override):
    assert plan_of(SFT, override).identity_hash == plan_of(SFT).identity_hash


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=1e-4",
        "seed=1",
        "lora.rank=8",
        "lora=null",
        "rows_per_step=3",
        "data.max_seq_tokens=64",
        "data.train=eval.jsonl",
        "model.compute_dtype=float32",
    ],
)
def test_what_changes_the_result_changes_the_identity(override):
    plan = plan_of(SFT, override, "data.eval=null", "eval_interval=0")
    assert plan.identity_hash != plan_of(SFT, "data.eval=null", "eval_interval=0").identity_hash


def test_the_identity_follows_rows_and_weights():
    recipe = write_small(Path())
    Path("model/model.safetensors").write_bytes(b"\0" * 100)
    first = make_plan(load_recipe(recipe)).identity_hash
    assert make_plan(load_recipe(recipe)).identity_hash == first

    rows = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(rows.replace("What is 3", "What is 4", 1))
    assert make_plan(load_recipe(recipe)).identity_hash != first
    Path("train.jsonl").write_text(rows)
    assert make_plan(load_recipe(recipe)).identity_hash == first

    Path("model/model.safetensors").write_bytes(b"\0" * 99 + b"\1")
    assert make_plan(load_recipe(recipe)).identity_hash != first


EIGHT_B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
"""Qwen3-8B."""


def test_parameters_are_counted_from_the_config():
    # 8.19 B as published; q and k norms (0.01 M) are not counted
    facts = ModelFacts.from_config(EIGHT_B)
    assert facts is not None
    assert facts.params == 8_190_726_144
    # rank 16 over all linears: 36 * 16 * (8192 + 2 * 5120 + 8192 + 3 * 16384)
    assert facts.lora_params(LoraSettings()) == 36 * 16 * 75776 == 43_646_976
    assert facts.lora_params(LoraSettings(target_modules=["q_proj", "v_proj"])) == 36 * 16 * (8192 + 5120)
    assert facts.lora_params(LoraSettings(target_modules=["q_proj", "odd"])) == 43_646_976


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ([], "cpu"),
        (["data.max_seq_tokens=8192"], "cpu"),  # a model of 29,000 parameters
        (["data.max_seq_tokens=70000"], "h100x1"),  # the CPU is bounded by 65,536 tokens
    ],
)
def test_auto_picks_the_smallest_shape_that_fits(overrides, shape):
    plan = plan_of(SFT, "shape=auto", *overrides)
    assert plan.shape.name == shape
    assert plan.origins["shape"] == "auto: the smallest that fits"


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        (["model.gradient_checkpointing=true"], "h100x1"),  # never the CPU, which holds 2 B
        (["model.gradient_checkpointing=true", "lora=null"], "a100x8"),  # one H200 holds 4 B in full
        (["model.gradient_checkpointing=true", "lora.target_modules=[q_proj]"], "h100x1"),
    ],
)
def test_auto_finds_a_gpu_shape_for_eight_billion_parameters(overrides, shape):
    recipe = write_small(Path())
    Path("model/config.json").write_text(json.dumps(EIGHT_B))
    assert make_plan(load_recipe(recipe, ["shape=auto", *overrides])).shape.name == shape


def test_auto_refuses_to_guess_at_a_model_of_unknown_size():
    hub = ["model.path=owner/unknown", f"model.revision={'a' * 40}"]
    with pytest.raises(ShapeError, match="--set shape: the sizes of owner/unknown are unknown"):
        plan_of(SFT, *hub, "shape=auto")
    plan = plan_of(SFT, *hub)
    assert plan.warnings == [
        "owner/unknown: the sizes of the model are unknown, so it was not checked that it fits cpu"
    ]


def test_sizes_of_a_downloaded_hub_model_are_read_from_the_cache(tmp_path):
    snapshot = tmp_path / "hub" / "hub" / "models--owner--unknown" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(EIGHT_B))
    recipe = load_recipe(write_small(Path()), ["model.path=owner/unknown", f"model.revision={'a' * 40}"]).recipe
    facts = model_facts(recipe)
    assert facts is not None
    assert facts.params == 8_190_726_144


def test_a_shape_that_cannot_hold_the_model_is_refused_with_its_line():
    recipe = write_small(Path())
    Path("model/config.json").write_text(json.dumps(EIGHT_B))
    with pytest.raises(ShapeError) as caught:
        make_plan(load_recipe(recipe))
    assert str(caught.value) == (
        "recipe.yaml:18: shape: cpu does not fit: supports models up to 6.7 B parameters for LoRA (estimated)\n"
        "What would fit, as predicted:\n"
        "  `--shape h100x1`: 19.9 of 79 GiB\n"
        "See also `trainer shapes RECIPE`."
    )
    # without gradient checkpointing the micro-batch of 16,384 tokens is too much: the estimate, not the limit
    with pytest.raises(ShapeError, match=r"does not fit: needs about \d+\.\d GiB per device and has 79") as caught:
        make_plan(load_recipe(recipe, ["rows_per_step=128"]), "h100x1")
    assert "\n  `model.gradient_checkpointing: true`: " in str(caught.value)
    assert "\n  `micro_batch_tokens: 8192` in a copy of the shape h100x1 (configs/shapes/): " in str(caught.value)


def test_where_nothing_fits_each_shape_says_why():
    with pytest.raises(ShapeError) as caught:
        plan_of(SFT, "shape=auto", "data.max_seq_tokens=200000")
    lines = str(caught.value).splitlines()
    assert lines[0] == "--set shape: no training shape fits 2.88e-05 B parameters at 200,000 tokens:"
    assert lines[1] == "  cpu: supports sequences up to 65,536 tokens (estimated)"
    assert len(lines) == 1 + len(all_shapes()) + 2
    assert lines[-2] == "What would fit, as predicted:"
    assert lines[-1] == "  `data.max_seq_tokens: 131072` and `--shape h100x1`: 1.6 of 79 GiB"


def test_an_unknown_shape_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"recipe\.yaml:18: shape: h100x9: unknown; did you mean `h100x8`\?"):
        plan_of(SFT.replace("shape: cpu", "shape: h100x9"))


def test_a_shape_of_ones_own_is_a_file():
    write_small(Path())
    own = find_shape("cpu").model_dump() | {"name": "mine", "micro_batch_tokens": 77}
    Path("mine.yaml").write_text(json.dumps(own))
    assert plan_of(SFT, "shape=mine.yaml").shape.micro_batch_tokens == 77


def test_a_wrong_shape_file_is_explained_like_a_recipe():
    Path("mine.yaml").write_text("name: mine\ndevice: gpu\n")
    with pytest.raises(RecipeError, match=r"mine.yaml:2: device: must be one of cpu, cuda \(got 'gpu'\)"):
        find_shape("mine.yaml")


def test_every_shape_makes_the_same_global_batch():
    plans = [plan_of(SFT, shape=shape.name) for shape in all_shapes()]
    assert len(plans) >= 8
    assert {(plan.recipe.rows_per_step, plan.steps, step_tokens(plan)) for plan in plans} == {
        (2, 10, step_tokens(plans[0]))
    }
    assert len({plan.identity_hash for plan in plans}) == 1


def test_accumulation_fills_micro_batches_over_all_ranks():
    # a row: prompt 14 and completion 8 characters, 2 turns of 5 tokens more: 22 / 3.5 + 10 = 16.29 tokens
    plan = plan_of(SFT, "rows_per_step=5000")
    assert step_tokens(plan) == pytest.approx(5000 * (22 / 3.5 + 10))
    assert accumulation(plan) == 80  # 81,429 tokens / 1,024
    assert accumulation(plan_of(SFT, "rows_per_step=5000", shape="h100x8")) == 1  # 8 x 16,384 = 131,072
    # rft: at most prompt + 16 new tokens, 4 completions for each prompt
    assert step_tokens(plan_of(RFT)) == pytest.approx(2 * 4 * (14 / 3.5 + 5 + 16))


def test_memory_parts_are_those_of_the_method():
    sft = plan_of(SFT).memory
    rft = plan_of(RFT).memory
    full = plan_of(SFT, "lora=null").memory
    assert sft is not None
    assert rft is not None
    assert full is not None
    assert sft.parts.keys() == {
        "base weights", "adapter", "masters", "gradients", "optimizer", "copies for checkpoints", "activations",
        "head", "fragmentation", "kernels", "process",
    }  # fmt: skip
    assert rft.parts.keys() - sft.parts.keys() == {"sampler's weights", "backward of the last norm"}
    assert rft.phases.keys() == {"learning", "sampling", "loading"}
    assert "adapter" not in full.parts
    # float32 masters, gradients and two moments
    assert full.state_gib == 28_832 * 16 / 2**30
    assert sft.parts["base weights"] == 28_832 * 2 / 2**30
    assert sft.total_gib == pytest.approx(sum(sft.parts.values()))
    assert sft.fits


def test_sharding_divides_the_blocks_of_a_frozen_base_and_everything_that_is_trained():
    lora, full = (plan_of(SFT, *changes, shape="h100x8").memory for changes in ([], ["lora=null"]))
    assert lora is not None
    assert full is not None
    whole = 320 * 32 + 32  # embedding, which is the head too, and the last norm
    assert lora.parts["base weights"] == pytest.approx((whole + (28_832 - whole) / 8) * 2 / 2**30)
    assert "gathered embedding and head" not in lora.parts
    assert full.parts["gathered embedding and head"] == 320 * 32 * 2 / 2**30


def test_a_broken_model_config_is_refused_in_words():
    recipe = write_small(Path())
    Path("model/config.json").write_text('{"hidden_size": ')
    with pytest.raises(UserError, match=r"model/config.json: not JSON .* Copy the model again"):
        make_plan(load_recipe(recipe))


@pytest.mark.parametrize("shape", ["cpu", "h100x8"])
def test_misfit_says_nothing_of_what_fits(shape):
    recipe = load_recipe(write_small(Path())).recipe
    assert misfit(recipe, find_shape(shape), model_facts(recipe)) is None


def test_rft_is_refused_where_an_indexer_would_select_keys():
    """Scores of keys can tie: sampler and trainer then attend to different keys (docs/models.md)."""
    path = write_small(Path(), RFT)
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "glm_moe_dsa", "index_topk": 16}))
    recipe = load_recipe(path).recipe
    longer = recipe.data.max_seq_tokens
    assert longer > 16
    said = misfit(recipe, find_shape("cpu"), model_facts(recipe))
    assert said is not None
    assert "glm_moe_dsa selects 16 keys per query" in said
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "glm_moe_dsa", "index_topk": longer}))
    assert misfit(recipe, find_shape("cpu"), model_facts(recipe)) is None
