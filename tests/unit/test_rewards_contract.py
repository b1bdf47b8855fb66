"""Names of rewards: found without imports, loaded with arguments, refused with a remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config.judge_settings import JUDGES
from trainer.config.reward_place import BUILT_IN
from trainer.errors import RewardError
from trainer.rewards.contract import importable, load_reward
from trainer.rewards.judges.open import Judging

MINE = """
import math
def scale(completion, row, *, factor, offset=0.0): return factor * len(completion) + offset
def three(completion, row, third): return 0.0
def batch(prompts, completions, answer, **columns): return [0.0] * len(completions)
def tokens(completion_ids, completions, **columns): return [0.0]
def alone(completion): return 0.0
number = 3
try:
    import json as maybe
except ImportError:
    pass
"""


@pytest.fixture
def base_dir(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def f(completion, row):\n    return (\n")
    (tmp_path / "raises.py").write_text("\n\nraise OSError('no disk')\ndef f(completion, row): ...\n")
    (tmp_path / "needs.py").write_text("import not_installed\ndef f(completion, row): ...\n")
    package = tmp_path / "beside" / "deep"
    package.mkdir(parents=True)
    (tmp_path / "beside" / "__init__.py").write_text("raise OSError('imported')\n")
    (package / "__init__.py").write_text("")
    (package / "rewards.py").write_text("def f(completion, row): return 1.0\n")
    return tmp_path


@pytest.mark.parametrize("use", BUILT_IN)
def test_every_built_in_reward_can_be_imported(use):
    args: dict[str, dict[str, Any]] = {
        "regex_match": {"pattern": "a"},
        "soft_overlong": {"max_characters": 2, "ramp_characters": 1},
        "http_reward": {"url": "http://localhost"},
        "llm_judge": {"url": "http://localhost/v1", "model": "m", "rubric": "Be brief."},
    }
    assert importable(use, Path()) is None
    if use in JUDGES:
        Judging().open(use, use, args[use], Path()).close()
    else:
        assert load_reward(use, args.get(use, {}), Path()).form == "single"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("last_numbr", "did you mean `last_number`?"),
        ("mine.py", "name your own as `module:function` or `file.py:function`"),
        ("mine.py:scal", "has no function `scal`; did you mean `scale`?"),
        ("mime.py:scale", "did you mean `mine.py`?"),
        ("broken.py:f", "broken.py:2: '(' was never closed"),
        ("not_installed:f", "no module `not_installed` is installed"),
        ("trl.reward:f", "no module `trl.reward` is installed"),
        ("json.decoder:nothing_of_this_name", "has no function `nothing_of_this_name`"),
    ],
)
def test_a_name_that_leads_nowhere_is_seen_without_importing(use, message, base_dir):
    assert message in str(importable(use, base_dir))


@pytest.mark.parametrize(
    "use", ["mine.py:scale", "mine.py:maybe", "mine.py:number", "beside.deep.rewards:f", "math:sin"]
)
def test_a_name_that_may_lead_somewhere_is_not_complained_about(use, base_dir):
    assert importable(use, base_dir) is None  # `beside` raises when imported, so it was not


def test_looking_for_trl_rewards_does_not_import_trl():
    script = (
        "import sys; from pathlib import Path; from trainer.rewards.contract import importable;"
        "print(importable('trl.rewards:accuracy_reward', Path()), 'trl' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "None False\n"


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("last_number", {"tolerence": 0.1}, "args.tolerence: unknown argument; did you mean `tolerance`?"),
        ("exact_match", {"row": {}}, "args.row: unknown argument"),
        ("regex_match", {}, "give `args: {pattern: ...}`"),
        ("mine.py:scale", {}, "give `args: {factor: ...}`"),
        ("mine.py:three", {}, "give `args: {third: ...}`"),
        ("mine.py:alone", {}, "neither `(completion, row)`, `(group, row)` nor `(prompts, completions, **columns)`"),
        ("mine.py:tokens", {}, "wants token ids"),
        ("mine.py:number", {}, "is a int, not a function"),
        ("raises.py:f", {}, "raises.py:3)"),
        ("needs.py:f", {}, "pip install not_installed"),
        ("broken.py:f", {}, "was never closed"),
    ],
)
def test_what_cannot_be_called_is_refused_before_training(use, args, message, base_dir):
    with pytest.raises(RewardError) as caught:
        load_reward(use, args, base_dir)
    assert message in str(caught.value)


def test_arguments_are_bound(base_dir):
    reward = load_reward("mine.py:scale", {"factor": 2.0}, base_dir)
    assert reward.function("abc", {}, **reward.args) == 6.0


def test_the_batch_form_is_known_by_its_parameters(base_dir):
    reward = load_reward("mine.py:batch", {}, base_dir)
    assert (reward.is_batch, reward.required, reward.takes("anything")) == (True, ("answer",), True)
