"""The loops of docs/training_api.md run, on a tiny model and for a few steps."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from trainer.checkpoints.saved_state import state_problem

PAGE = (Path(__file__).parents[2] / "docs" / "training_api.md").read_text(encoding="utf-8")
LOOPS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", scale=5.0)


def test_the_page_has_the_three_loops_each_below_sixty_lines() -> None:
    assert sorted(LOOPS) == ["dpo", "grpo", "sft"]
    assert {name: len(text.splitlines()) for name, text in LOOPS.items() if len(text.splitlines()) >= 60} == {}


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_loop_runs(name, model_dir, tmp_path, monkeypatch, capsys) -> None:
    text = LOOPS[name].replace('"models/SmolLM2-135M-Instruct"', repr(str(model_dir)))
    text = re.sub(r"(MODEL, STEPS.*= .*?, )(20|10)\b", r"\g<1>4", text).replace("1e-4", "1e-2")
    script = tmp_path / f"{name}.py"
    script.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(script))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in range(4)]
    assert state_problem(tmp_path / "states" / name) is None
    assert found["model"].updates == 4
    if name != "grpo":  # its reward is noise on a random model
        first, last = (float(re.search(r"loss ([\d.]+)", lines[index]).group(1)) for index in (0, -1))
        assert last < first
