"""plan.json of earlier versions stays readable, and the identity of a run stays what it was.

tests/old_plans/ holds plans of the two small recipes as the code wrote them in format 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.config.presets import PRESETS
from trainer.errors import LaunchError
from trainer.planning.plan import RFTPlan, SFTPlan, make_plan, parse_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.state import Outcome

OLD_PLANS = Path(__file__).resolve().parents[1] / "old_plans"
RECIPES = {"sft": SFT, "rft": RFT}


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def old_text(method: str) -> str:
    return (OLD_PLANS / f"{method}.json").read_text()


def test_an_old_sft_plan_is_read():
    plan = parse_plan(old_text("sft"))
    assert isinstance(plan, SFTPlan)
    assert (plan.format, plan.steps, plan.num_rows, plan.shape.name) == (2, 10, 6, "cpu")
    assert (plan.facts, plan.memory, plan.row_tokens) == (None, None, None)
    assert plan.recipe.lora is not None
    assert plan.recipe.lora.rank == 4


def test_the_algorithm_of_an_old_rft_plan_is_resolved():
    plan = parse_plan(old_text("rft"))
    assert isinstance(plan, RFTPlan)
    assert (plan.algorithm.clip_low, plan.algorithm.clip_high) == (0.1, PRESETS["dapo"].clip_high)
    assert (plan.algorithm.name, plan.algorithm.loss, plan.algorithm.overlong) == ("dapo", "grpo", "mask")


@pytest.mark.parametrize("method", ["sft", "rft"])
def test_an_old_plan_has_the_identity_of_the_same_recipe_today(method):
    old = parse_plan(old_text(method))
    new = make_plan(load_recipe(write_small(Path(), RECIPES[method])))
    assert new.identity == old.identity
    assert new.identity_hash == old.identity_hash


@pytest.mark.parametrize(
    ("method", "override", "wanted"),
    [
        ("sft", "lora=null", "cf42583b1327604f044d8b17cfdd994b74356e810ac528baf332dd90480d482e"),
        ("sft", "model.quantization=nf4", "8a6c88b0a9151379e2975be956654d76d9f38532c37ef676e97d38bac0452f30"),
        ("sft", "seed=3", "c9a9eddcf89bd9fe22737236c939b4bd9af8a07b911f96a6029ed47a1bc5717c"),
        ("rft", "lora=null", "199b7c542c69302a5eac35bc2ff56df1b2a19499915b84170c99dd973b5eedd2"),
        ("rft", "model.quantization=nf4", "3870dc68d9f9adc2d84bfd7ea69d4ffebec75f6770f49adfbe6d373758b6a414"),
        ("rft", "seed=3", "563bf693b9dc9f84615210c3a24ed27ea477387a25f313823e0570085c467ead"),
    ],
)
def test_identity_hashes_are_those_of_format_1(method, override, wanted):
    assert make_plan(load_recipe(write_small(Path(), RECIPES[method]), [override])).identity_hash == wanted


@pytest.mark.parametrize("method", ["sft", "rft"])
def test_a_run_begun_in_format_1_goes_on_and_its_plan_is_rewritten(method):
    run = RunDir(Path("runs/small"))
    run.root.mkdir(parents=True)
    run.plan_file.write_text(old_text(method))
    plan = make_plan(load_recipe(write_small(Path(), RECIPES[method])))
    assert open_run(plan) == run
    assert run.read_plan() == plan
    assert json.loads(run.plan_file.read_text())["format"] == 2


@pytest.mark.parametrize("method", ["sft", "rft"])
def test_status_of_a_finished_run_of_format_1(method, capsys):
    run = RunDir(Path("runs/small"))
    run.root.mkdir(parents=True)
    run.plan_file.write_text(old_text(method))
    run.metrics_file.write_text('{"step": 10, "time": 1.0, "attempt": 1, "train/loss": 0.5}\n')
    run.write_outcome(Outcome("finished", 10, "finished", 0))
    assert main(["status", "small", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["state"], about["step"], about["steps"]) == ("finished", 10, 10)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"format": 3}', '{"format": 1}', '{"format": 1, "recipe": {"method": "rft"}}', '{"format": 2}', "no"],
)
def test_what_is_no_plan_is_refused_in_words(text):
    run = RunDir(Path("runs/small"))
    run.root.mkdir(parents=True)
    run.plan_file.write_text(text)
    with pytest.raises(LaunchError, match=r"runs/small/plan.json: not a plan of this version"):
        run.read_plan()
