"""Every example is accepted by `trainer check`, and each of its rows becomes tokens."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import trl
from small_recipe import write_small
from tiny import tiny_tokenizer

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.config.recipe import RFTRecipe
from trainer.data.chat import ChatEncoder
from trainer.data.sources import read_rows
from trainer.environments.contract import Environment, Message
from trainer.types import Row

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*/recipe.yaml"))
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_table_lists_them_all() -> None:
    page = (ROOT / "examples/README.md").read_text()
    assert [path.parent.name for path in EXAMPLES if f"]({path.parent.name}/recipe.yaml)" not in page] == []
    assert [path.parent.name for path in EXAMPLES] == [
        "agent_rft", "chat_style", "code_rft", "continued_pretraining", "extraction", "math_rft", "qlora_24gb",
        "tool_calling",
    ]  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_check_accepts_it(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", str(path.relative_to(ROOT))]
    if "path: models/" in path.read_text():  # the embedded model need not be here
        write_small(tmp_path)
        arguments += ["--set", f"model.path={tmp_path / 'model'}"]
    assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_row_becomes_tokens(path: Path) -> None:
    text = path.read_text()
    overrides = [] if "path: models/" not in text else ["model.path=Qwen/Qwen3-8B", "model.revision=main"]
    recipe = load_recipe(path.relative_to(ROOT), overrides).recipe
    tokenizer = tiny_tokenizer()
    if "Qwen3" in text:
        tokenizer.chat_template = QWEN3
    data = recipe.data.model_copy(update={"max_seq_tokens": 8192})  # the tiny tokenizer makes more tokens
    rows = read_rows(data.train, data)
    assert len(rows) >= 6
    encoder = ChatEncoder(tokenizer, recipe.model, data, for_prompts=isinstance(recipe, RFTRecipe))
    for row in rows:
        if isinstance(recipe, RFTRecipe):
            if recipe.rollout.environment is not None:  # it writes the prompt
                assert isinstance(recipe.rollout.environment, str)
                row = Row({"messages": _first_messages(recipe.rollout.environment, path, row)})
            assert encoder.encode_prompt(row)
        else:
            assert all(sequence.num_trained for sequence in encoder.encode([row]).sequences)


def _first_messages(place: str, recipe: Path, row: Row) -> list[Message]:
    file, _, name = place.partition(":")
    environment: Environment = runpy.run_path(str(recipe.parent / file))[name]()
    start = environment.reset(row, seed=0)
    assert start.tools
    return list(start.messages)
