"""Every recipe that ships is loaded, resolved and run for two steps, on a tiny model of its architecture."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model_dir

from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan
from trainer.worker import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# All that CI substitutes: the model's weights, the shape, the length of the run, and how much is sampled.
SUBSTITUTES = [
    "model.path={model}",
    "model.revision=null",
    "model.compute_dtype=float32",
    "model.gradient_checkpointing=false",
    "shape=cpu",
    "steps=2",
    "epochs=null",
    "optimizer.warmup_steps=0",
    "rows_per_step=2",
    "eval_interval=0",
    "data.eval_rows=2",
    "data.max_seq_tokens=4096",
    "data.overlong=truncate",
]
SUBSTITUTES_RFT = [
    "data.overlong=error",
    "rollout.sampler=local",
    "rollout.group_size=2",
    "rollout.eval_samples=1",
    "rollout.max_completion_tokens=8",
    "rollout.refill=false",
    "algorithm.overlong=keep",  # random weights never stop by themselves, and dapo masks what was cut
    "algorithm.minibatches_per_step=1",
    "reward_limits.max_failed_frac=1.0",
]
GSM8K = [
    {"question": "Tom has 3 apples and buys 4. How many has he?", "answer": "He has 3 + 4 = <<3+4=7>>7.\n#### 7"},
    {"question": "Ann has 9 pens and loses 5. How many are left?", "answer": "9 - 5 = <<9-5=4>>4 are left.\n#### 4"},
    {"question": "Two boxes hold 6 eggs each. How many eggs?", "answer": "2 * 6 = <<2*6=12>>12 eggs.\n#### 12"},
]


@pytest.fixture
def _handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("_handlers_restored")
def test_recipe_runs_two_steps(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = yaml.safe_load(recipe.read_text())
    arch = "qwen3" if "qwen3" in recipe.stem else "llama"
    model = tiny_model_dir(tmp_path / "model", arch=arch)
    overrides = [text.format(model=model) for text in SUBSTITUTES]
    overrides += SUBSTITUTES_RFT if written["method"] == "rft" else []
    if "gsm8k" in recipe.read_text():  # the real rows are not in this repository
        rows = tmp_path / "gsm8k.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
        held_out = tmp_path / "held_out.jsonl"
        held_out.write_text("".join(json.dumps(row) + "\n" for row in GSM8K[:2]))
        overrides += [f"data.train.path={rows}", f"data.eval.path={held_out}"]
    if isinstance(written.get("lora"), dict) and written["lora"].get("warm_start"):
        overrides.append("lora.warm_start=null")
    if "sql_agent" in recipe.stem:  # the tiny model's own template shows no tools
        overrides.append("model.chat_template=hermes")
    monkeypatch.chdir(tmp_path)
    for name in ("datasets", "configs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    arguments = [argument for text in overrides for argument in ("--set", text)]
    assert main([str(Path("recipes") / recipe.name), *arguments, "--name", "two-steps"]) == 0
    run = tmp_path / "runs" / "two-steps"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["step"]] == [1, 2]
    assert all(record["train/grad_norm"] >= 0 for record in records if record["step"])
    assert json.loads((run / "outcome.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_sets_what_every_shipped_recipe_sets(recipe: Path) -> None:
    written = yaml.safe_load(recipe.read_text())
    assert written["name"] == recipe.stem
    assert written["dcp_save_interval"] > 0
    assert recipe.read_text().startswith("# yaml-language-server: $schema=../docs/recipe.schema.json\n")


@pytest.mark.parametrize("recipe", [path for path in RECIPES if "x8" in path.stem], ids=str)
def test_gpu_recipe_is_planned_on_the_shape_in_its_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = make_plan(load_recipe(recipe.relative_to(ROOT)))
    assert recipe.stem.endswith(plan.shape.name)
