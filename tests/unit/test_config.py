"""Recipes: every mistake at once with its line, and contradictions."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.config.load import load_recipe
from trainer.config.recipe import RFTRecipe, SFTRecipe
from trainer.config.rft_sections import AlgorithmSettings, RolloutSettings
from trainer.errors import RecipeError


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def mistakes_of(recipe: str, *overrides: str) -> list[str]:
    path = write_small(Path(), recipe)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.mistakes


def warnings_of(recipe: str, *overrides: str) -> tuple[str, ...]:
    return load_recipe(write_small(Path(), recipe), overrides).warnings


def test_the_small_recipe_is_valid_and_raises_no_warning():
    assert warnings_of(SFT) == ()
    assert warnings_of(RFT) == ()


def test_five_mistakes_are_reported_at_once_each_on_its_line():
    assert mistakes_of(
        """\
name: a b
method: sfr
model: {path: model}
data: {train: train.jsonl}
rows_per_step: 0
steps: 10
optimizer:
  learning_rates: 1e-3
  beta1: 1.5
"""
    ) == [
        "recipe.yaml:1: name: must be letters, digits, `.`, `_` or `-`, beginning with a letter or digit (got 'a b')",
        "recipe.yaml:2: method: must be one of sft, rft (got 'sfr'); did you mean `sft`?",
        "recipe.yaml:5: rows_per_step: must be greater than 0 (got 0)",
        "recipe.yaml:8: optimizer.learning_rates: unknown field; did you mean `learning_rate`?",
        "recipe.yaml:9: optimizer.beta1: must be less than 1 (got 1.5)",
    ]


def test_a_contradiction_is_reported_beside_a_wrong_value():
    recipe = SFT.replace("warmup_steps: 2", "warmup_steps: 10").replace("rank: 4", "rnak: 4")
    assert mistakes_of(recipe) == [
        "recipe.yaml:6: lora.rnak: unknown field; did you mean `rank`?",
        "recipe.yaml:15: optimizer.warmup_steps: warm-up of 10 steps is not shorter than the run of 10 steps",
    ]


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("rank: 4", "rank: '4'", "6: lora.rank: must be a whole number (got '4'); remove the quotes"),
        ("rank: 4", "rank: 4.5", "6: lora.rank: must be a whole number (got 4.5)"),
        ("learning_rate: 1e-3", "learning_rate: fast", "14: optimizer.learning_rate: must be a number (got 'fast')"),
        (
            "learning_rate: 1e-3",
            "learning_rate: -1e-3",
            "14: optimizer.learning_rate: must be greater than 0 (got -0.001)",
        ),
        ("name: small", "name: 2024", "1: name: must be text (got 2024); put it in quotes"),
        ("rank: 4", "target_modules: 5", "6: lora.target_modules: must be `all-linear` or a list (got 5)"),
        (
            "rank: 4",
            "target_modules: all-liner",
            "6: lora.target_modules: must be `all-linear` or a list (got 'all-liner'); did you mean `all-linear`?",
        ),
        ("rank: 4", "target_modules: [q_proj, 7]", "6: lora.target_modules.1: must be text (got 7); put it in quotes"),
        (
            "rank: 4",
            "target_modules: []",
            "6: lora.target_modules: must be `all-linear` or a list with at least one entry (got [])",
        ),
        (
            "train: train.jsonl",
            "train: 7",
            "8: data.train: must be a section with fields of its own: "
            "path, hub, config, split, revision, repeat, sources (got 7)",
        ),
        ("train: train.jsonl", "train: {file: train.jsonl}", "8: data.train.file: unknown field; "),
        (
            "train: train.jsonl",
            "system: Hi",
            "7: data.train: missing. "
            "Rows to train on: a path, `{path, hub, config, split, revision}`, or a list of them.",
        ),
        ("steps: 10", "steps: 10\nsteps: 12", "13: steps: given twice (first on line 12)"),
        ("rank: 4", "rank: 4\n  rank: 5", "7: lora.rank: given twice (first on line 6)"),
    ],
)
def test_a_mistake_says_where_what_and_how_to_mend_it(old, new, mistake):
    (found,) = mistakes_of(SFT.replace(old, new))
    assert found.startswith(f"recipe.yaml:{mistake}")


@pytest.mark.parametrize(
    ("address", "mistake"),
    [
        ("backup/runs", "must be an address such as `s3://bucket/prefix` or `file:///backup` (got 'backup/runs')"),
        ("s3:/bucket", "must be an address such as `s3://bucket/prefix` or `file:///backup` (got 's3:/bucket')"),
        ("s3://", "must be an address such as `s3://bucket/prefix` or `file:///backup` (got 's3://')"),
        (
            "s3n://bucket",
            "unknown protocol `s3n`; known are s3, s3a, gs, gcs, az, abfs, abfss, oss, tos, oci, hf, sftp, ssh, smb, "
            "webdav, webhdfs, hdfs, ftp, file; did you mean `s3`?",
        ),
        ("s3:///prefix", "s3:///prefix names no bucket; write `s3://bucket/prefix`"),
        (
            "sftp://me:secret@host/backup",
            "contains a password, which would be stored in run directories; set it in the environment (docs/mirror.md)",
        ),
    ],
)
def test_a_malformed_mirror_is_refused_at_its_line(address, mistake):
    recipe = SFT.replace("shape: cpu", f"checkpoint:\n  mirror: '{address}'\nshape: cpu")
    assert mistakes_of(recipe) == [f"recipe.yaml:19: checkpoint.mirror: {mistake}"]


@pytest.mark.parametrize("address", ["s3://bucket/a/prefix", "file:///backup", "sftp://me@host/backup", "gs://bucket"])
def test_a_mirror_is_any_address_that_can_be_written_to(address):
    recipe = SFT.replace("shape: cpu", f"checkpoint:\n  mirror: '{address}'\nshape: cpu")
    assert load_recipe(write_small(Path(), recipe)).recipe.checkpoint.mirror == address


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "recipe.yaml:1: expected a mapping of fields, found nothing"),
        ("- a\n- b\n", "recipe.yaml:1: expected a mapping of fields, found a list"),
        ("name: [a\n", "recipe.yaml:2: not YAML: "),
        ("name: a\nmethod: !made_up sft\n", "recipe.yaml:2: not YAML: could not determine a constructor"),
        ("name: a\nseed: 2024-13-45\n", "recipe.yaml: not YAML: month must be in 1..12"),
        ("name: &a {b: *a}\n", "recipe.yaml: not YAML: "),
    ],
)
def test_what_is_no_recipe_is_refused_without_a_traceback(text, mistake):
    (found,) = mistakes_of(text)
    assert found.startswith(mistake)


def test_bytes_that_are_not_utf8_are_named_by_line():
    Path("recipe.yaml").write_bytes(b"name: a\nmethod: sft \xff\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:2: byte 20 is not UTF-8"):
        load_recipe(Path("recipe.yaml"))


def test_a_missing_recipe_is_named():
    with pytest.raises(RecipeError, match=r"none\.yaml: no such file"):
        load_recipe(Path("none.yaml"))


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_scientific_notation_is_a_number(text):
    recipe = load_recipe(write_small(Path(), SFT.replace("1e-3", text))).recipe
    assert recipe.optimizer.learning_rate == 0.001


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("steps: 10\n", "", "recipe.yaml: steps: missing; say how long to train with `steps` or `epochs`"),
        ("steps: 10", "steps: 10\nepochs: 1", "recipe.yaml:13: epochs: contradicts `steps`; give one of them"),
        # 6 rows, 2 a step: half an epoch is 2 steps
        (
            "steps: 10",
            "epochs: 0.5",
            "recipe.yaml:15: optimizer.warmup_steps: warm-up of 2 steps is not shorter than the run of 2",
        ),
        (
            "eval: eval.jsonl",
            "eval: train.jsonl",
            "recipe.yaml:9: data.eval: is the training data; evaluate on other rows",
        ),
        ("eval: eval.jsonl", "eval: ./train.jsonl", "recipe.yaml:9: data.eval: is the training data"),
        ("  eval: eval.jsonl\n", "", "recipe.yaml:15: eval_interval: needs held-out rows: set `data.eval`"),
        (
            "train: train.jsonl",
            "train: none.jsonl",
            "recipe.yaml:8: data.train: no such file: none.jsonl (paths are relative to",
        ),
        (
            "train: train.jsonl",
            "train: model",
            "recipe.yaml:8: data.train: model is a directory without data files "
            "(.jsonl, .json, .ndjson, .parquet, .csv, .tsv, .arrow)",
        ),
        (
            "train: train.jsonl",
            "train: {split: train}",
            "recipe.yaml:8: data.train: give `path` (a JSONL file) or `hub`",
        ),
        ("path: model", "path: models/none", "recipe.yaml:4: model.path: no such directory: models/none"),
        ("path: model", "path: gone", "recipe.yaml:4: model.path: no such directory: gone; a hub name is `owner/name`"),
        ("path: model", "path: .", "recipe.yaml:4: model.path: . has no config.json: not a model directory"),
        ("path: model", "path: owner/name", "recipe.yaml:4: model.path: a hub name needs `model.revision`, a commit"),
        (
            "path: model",
            "path: model\n  chat_template: no.jinja",
            "recipe.yaml:5: model.chat_template: no such file: no.jinja",
        ),
        ("rank: 4", "warm_start: model", "recipe.yaml:6: lora.warm_start: model holds no adapter (no adapter_config"),
        ("shape: cpu", "rewards: [{use: last_number}]", "recipe.yaml:18: rewards: belongs to `method: rft`"),
    ],
)
def test_an_sft_contradiction_is_an_error_at_its_line(old, new, mistake):
    (found,) = mistakes_of(SFT.replace(old, new))
    assert found.startswith(mistake)


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("group_size: 4", "group_size: 1", "14: rollout.group_size: must be at least 2 (got 1)"),
        ("use: last_number", "use: last_numbr", "17: rewards.0.use: no built-in reward of this name; did you mean"),
        ("use: last_number", "use: mine.py:score", "17: rewards.0.use: no file mine.py"),
        ("use: last_number", "use: no_such:score", "17: rewards.0.use: no module `no_such` is installed"),
        ("rewards:", "rewards:\n  - use: last_number", "18: rewards.1: two rewards are called last_number"),
        ("- use: last_number", "[]", "16: rewards: missing; rft needs at least one reward"),
        ("group_size: 4", "top_p: 0.9", "14: rollout.top_p: truncated sampling biases the gradient"),
        ("clip_low: 0.1\nrollout:", "mismatch_cap: 2.0\nrollout:\n  top_k: 9", "14: rollout.top_k: truncated sampling"),
        ("tokens: 16", "tokens: 128", "15: rollout.max_completion_tokens: 128 leaves no room"),
        ("clip_low: 0.1", "minibatches_per_step: 3", "12: algorithm.minibatches_per_step: 3 minibatches do not divide"),
        ("name: small", "name: small\nlora: {dropout: 0.1}", "2: lora.dropout: rft needs 0"),
        ("max_seq_tokens: 128", "max_seq_tokens: 128\n  format: text", "8: data.format: rft prompts are chats"),
        ("name: dapo", "name: ppo", "11: algorithm.name: must be one of grpo, gspo, cispo, dapo, dr_grpo (got 'ppo')"),
        ("clip_low: 0.1", "kl_estimator: k4", "12: algorithm.kl_estimator: must be one of k1, k2, k3, k3_corrected"),
    ],
)  # fmt: skip
def test_an_rft_contradiction_is_an_error_at_its_line(old, new, mistake):
    (found,) = mistakes_of(RFT.replace(old, new))
    assert found.startswith(f"recipe.yaml:{mistake}")


def test_a_reward_in_a_file_beside_the_recipe_is_found_without_importing_it():
    Path("mine.py").write_text("import no_such_package\n\ndef score(completion, row):\n    return 1.0\n")
    assert warnings_of(RFT.replace("use: last_number", "use: mine.py:score")) == ()
    (found,) = mistakes_of(RFT.replace("use: last_number", "use: mine.py:scroe"))
    assert found == "recipe.yaml:17: rewards.0.use: mine.py has no function `scroe`; did you mean `score`?"


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        (
            "dcp_save_interval: 5\n",
            "",
            "recipe.yaml: dcp_save_interval: 0: no checkpoints are saved, so a killed run starts over.",
        ),
        (
            "dcp_save_interval: 5",
            "dcp_save_interval: 0",
            "recipe.yaml:17: dcp_save_interval: 0: no checkpoints are saved",
        ),
        ("rows_per_step: 2", "rows_per_step: 7", "recipe.yaml:11: rows_per_step: more than the 6 rows"),
        (
            "train: train.jsonl",
            "train: {path: none.jsonl, hub: owner/rows}",
            "recipe.yaml:8: data.train: rows come from the hub (owner/rows) and may change; pin `revision`",
        ),
    ],
)
def test_what_is_odd_but_allowed_is_a_warning(old, new, warning):
    (found,) = warnings_of(SFT.replace(old, new))
    assert found.startswith(warning)


def test_a_pinned_commit_raises_no_warning():
    assert warnings_of(SFT.replace("path: model", f"path: owner/name\n  revision: {'0123456789' * 4}")) == ()


def test_epochs_of_rows_on_a_hub_are_refused_with_the_remedy():
    recipe = SFT.replace("train: train.jsonl", "train: {hub: owner/rows}").replace("steps: 10", "epochs: 1")
    assert "recipe.yaml:12: epochs: the rows of owner/rows cannot be counted here; give `steps`" in mistakes_of(recipe)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("algorithm", "{name: dapo}"),
        ("rollout", "{}"),
        ("rollout", "{no_such_field: 1}"),  # not worth naming: the whole section goes
        ("rewards", "[{use: last_number}]"),
        ("reward_limits", "{timeout_s: 1}"),
    ],
)
def test_a_field_of_rft_in_an_sft_recipe_is_refused_at_its_line(field, value):
    (found,) = mistakes_of(SFT + f"{field}: {value}\n")
    assert found == f"recipe.yaml:19: {field}: belongs to `method: rft`; remove it or change the method"


@pytest.mark.parametrize("field", ["algorithm: null", "rollout: null", "rewards: []"])
def test_an_empty_field_of_rft_asks_for_nothing(field):
    recipe = load_recipe(write_small(Path(), SFT + f"{field}\n")).recipe
    assert isinstance(recipe, SFTRecipe)


def test_a_section_of_rft_that_is_null_or_left_out_has_its_defaults():
    text = RFT.replace("algorithm:\n  name: dapo\n  clip_low: 0.1\n", "algorithm: null\n")
    text = text.replace(
        "rollout:\n  group_size: 4\n  max_completion_tokens: 16\n", "rollout: {max_completion_tokens: 9}\n"
    )
    recipe = load_recipe(write_small(Path(), text)).recipe
    assert isinstance(recipe, RFTRecipe)
    assert recipe.algorithm == AlgorithmSettings()
    assert recipe.rollout == RolloutSettings(max_completion_tokens=9)


@pytest.mark.parametrize(
    ("method", "mistake"),
    [
        ("", "recipe.yaml: method: missing. `sft` is supervised fine-tuning; `rft` is reinforcement fine-tuning from"),
        ("method: rtf\n", "recipe.yaml:2: method: must be one of sft, rft (got 'rtf'); did you mean `rft`?"),
        ("method: [rft]\n", "recipe.yaml:2: method: must be one of sft, rft (got ['rft'])"),
    ],
)
def test_without_a_method_the_other_mistakes_are_those_of_the_method_that_the_fields_suggest(method, mistake):
    text = RFT.replace("method: rft\n", method).replace("group_size: 4", "group_sise: 4")
    found = mistakes_of(text)
    assert len(found) == 2
    line = 14 if method else 13
    assert f"recipe.yaml:{line}: rollout.group_sise: unknown field; did you mean `group_size`?" in found
    assert any(each.startswith(mistake) for each in found)
