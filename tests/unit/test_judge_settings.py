"""A judge whose arguments are wrong is refused by `trainer check` at its line; a resumed run may ask elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recipe import RFT, write_small

from trainer.commands.first_look import find_problems
from trainer.config.load import load_recipe
from trainer.errors import RecipeError
from trainer.planning.identity import reward_digests
from trainer.planning.plan import make_plan

JUDGED = RFT.replace(
    "  - use: last_number\n",
    "  - use: llm_judge\n    args:\n      url: http://localhost:8000/v1\n      model: m\n      rubric: Be brief.\n",
)
"""The judge's arguments begin in line 18."""


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mistakes_of(old: str, new: str) -> list[str]:
    assert old in JUDGED
    path = write_small(Path(), JUDGED.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value.mistakes


def test_a_sound_judge_is_accepted_without_a_warning() -> None:
    assert load_recipe(write_small(Path(), JUDGED)).warnings == ()


RUBRIC = "rubric: Be brief."


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("      model: m\n", "", "rewards.0.args.model: missing. Name of the model on the server."),
        ("model: m", "model: m\n      concurency: 3", "args.concurency: unknown field; did you mean `concurrency`?"),
        (
            "model: m",
            "model: m\n      on_outage: stop",
            "args.on_outage: must be one of wait, fail, abstain (got 'stop')",
        ),
        ("model: m", "model: m\n      scale: [5, 1]", "args.scale: the lowest score (5) must be below the highest (1)"),
        ("model: m", "model: m\n      timeout_s: 0", "args.timeout_s: must be greater than 0 (got 0)"),
        (RUBRIC, "rubric: ' '", "args.rubric: is empty"),
        (RUBRIC, "temperature: 0.5", "args.rubric: give `rubric` (a text) or `rubric_file`, one of them"),
        (RUBRIC, "rubric_file: none.md", "args.rubric_file: no such file: none.md"),
        ("http://localhost", "localhost", "args.url: must begin with http:// or https:// and name a host"),
        ("http://", "http://me:pw@", "args.url: contains a password, which would be stored in run directories"),
        ("model: m", "model: m\n      api_key_env: sk-123", "must be the name of an environment variable, not the key"),
        ("model: m", "model: m\n      extra_body: {messages: []}", "extra_body.messages: is set by llm_judge itself"),
    ],
)
def test_a_mistake_is_named_at_its_line(old: str, new: str, mistake: str) -> None:
    (found,) = mistakes_of(old, new)
    assert mistake in found
    assert found.startswith("recipe.yaml:")
    assert int(found.split(":")[1]) >= 17


def test_the_key_never_stands_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    keyed = JUDGED.replace("model: m", "model: m\n      api_key_env: JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    (warning,) = load_recipe(write_small(Path(), keyed)).warnings
    assert warning.endswith("args.api_key_env: the variable JUDGE_KEY is not set here; a run needs it")
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    plan = make_plan(load_recipe(write_small(Path(), keyed)))
    assert "sk-secret" not in plan.dump()


def test_secrets_in_headers_are_warned_about() -> None:
    posted = RFT.replace(
        "- use: last_number", "- use: http_reward\n    args: {url: 'http://h', headers: {Authorization: Bearer x}}"
    )
    (warning,) = load_recipe(write_small(Path(), posted)).warnings
    assert "args.headers.Authorization: is stored in run directories" in warning


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("http://localhost:8000/v1", "https://elsewhere/v1", True),
        ("model: m", "model: m\n      concurrency: 32\n      on_outage: fail", True),
        ("model: m", "model: other", False),
        ("Be brief.", "Be verbose.", False),
    ],
)
def test_where_a_judge_is_asked_is_no_part_of_the_identity(old: str, new: str, is_same: bool) -> None:
    first, second = (make_plan(load_recipe(write_small(Path(), text))) for text in (JUDGED, JUDGED.replace(old, new)))
    assert (first.identity_hash == second.identity_hash) is is_same


def test_the_digest_of_a_rubric_file_is_recorded_as_that_of_a_reward_file() -> None:
    Path("rubric.md").write_text("Be brief.")
    recipe = load_recipe(write_small(Path(), JUDGED.replace(RUBRIC, "rubric_file: rubric.md"))).recipe
    digests = reward_digests(recipe, Path())
    assert list(digests) == ["rubric.md"]
    Path("rubric.md").write_text("Be verbose.")
    assert reward_digests(recipe, Path()) != digests


def test_a_column_that_chooses_rewards_is_checked_on_the_first_rows() -> None:
    path = write_small(Path(), RFT + "reward_column: task\n")
    recipe = load_recipe(path).recipe
    assert find_problems(recipe, Path())[0] == (
        "train.jsonl:1: no field `task` (reward_column); the row has: prompt, completion, answer"
    )
    with pytest.raises(RecipeError, match=r"every_row: only says something with `reward_column`"):
        load_recipe(write_small(Path(), RFT.replace("- use: last_number", "- use: last_number\n    every_row: true")))


def test_pruning_without_checkpoints_is_warned_about() -> None:
    pruned = RFT.replace("group_size: 4", "group_size: 4\n  keep_steps: 3")
    assert load_recipe(write_small(Path(), pruned)).warnings == ()
    texts = load_recipe(write_small(Path(), pruned.replace("dcp_save_interval: 5", "dcp_save_interval: 0"))).warnings
    assert any("rollout.keep_steps: nothing is removed without checkpoints" in text for text in texts)
    plans = [make_plan(load_recipe(write_small(Path(), text))) for text in (RFT, pruned)]
    assert plans[0].identity_hash == plans[1].identity_hash


def test_truncated_prompts_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"data.overlong: a truncated prompt asks something else"):
        load_recipe(
            write_small(Path(), RFT.replace("max_seq_tokens: 128", "max_seq_tokens: 128\n  overlong: truncate"))
        )
