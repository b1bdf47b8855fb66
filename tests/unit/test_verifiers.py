"""Tasksets of verifiers 0.4, unmodified, in an interpreter of their own; skipped without one.

`VERIFIERS_PYTHON` names it, or `.venv-verifiers` in the repository has it (docs/environments.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from obedient import turn

from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool, EnvironmentSettings
from trainer.errors import RewardError
from trainer.types import Row

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VERIFIERS_PYTHON", ROOT / ".venv-verifiers/bin/python"))
SHOP = ROOT / "examples/verifiers_taskset"
TELL = {"invalid_json": "tell", "unclosed": "tell", "unknown_tool": "tell", "bad_arguments": "tell"}
TASKS = """
import sys
import verifiers.v1 as vf

class Data(vf.TaskData):
    kind: str

class KindTask(vf.Task[Data]):
    @vf.reward
    async def scored(self, trace: vf.Trace) -> float:
        match self.data.kind:
            case "nan": return float("nan")
            case "exit": sys.exit(0)
            case "raise": raise LookupError("no such thing")
        return 0.5

    @vf.reward(weight=2.0)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or "") < 10)

    @vf.metric
    async def letters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or ""))

class Kinds(vf.Taskset[KindTask]):
    def load(self):
        for kind in ("plain", "nan", "exit", "raise"):
            yield KindTask(Data(prompt="Say something.", system_prompt="Be brief.", kind=kind), self.config.task)

__all__ = ["Kinds"]
"""
TWICE = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    pass

class TwoTask(vf.Task[Data]):
    @vf.reward
    async def one(self, trace: vf.Trace) -> float:
        return 1.0

class Two(vf.Taskset[TwoTask]):
    def load(self):
        yield TwoTask(Data(prompt="go"), self.config.task)

class PairConfig(vf.EnvConfig):
    first: vf.AgentConfig = vf.AgentConfig()
    second: vf.AgentConfig = vf.AgentConfig()

class Pair(vf.Env[PairConfig]):
    async def run(self, task, agents):
        await agents.first.run(task)
        await agents.second.run(task)

__all__ = ["Two", "Pair"]
"""
OLD = "import verifiers as vf\n\ndef load_environment():\n    return vf.SingleTurnEnv(rubric=vf.Rubric())\n"

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not PYTHON.exists(), reason="no interpreter with verifiers (VERIFIERS_PYTHON)"),
]


def settings(place: Path, taskset: str, python: Path = PYTHON) -> EnvironmentSettings:
    named = {"verifiers": taskset, "config": {}, "max_turns": 3}
    return EnvironmentSettings(
        named, (), TELL, place, timeout_s=240.0, memory_limit_gib=4.0, python=str(python), num_workers=2
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verifiers")
    for name, text in (("kinds", TASKS), ("twice", TWICE), ("old_env", OLD)):
        (directory / f"{name}.py").write_text(text)
    return directory


@pytest.fixture(scope="module")
def shop() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(settings(SHOP, "shop_tasks")) as pool:
        yield pool


@pytest.fixture(scope="module")
def kinds(place: Path) -> Iterator[EnvironmentPool]:
    with EnvironmentPool(settings(place, "kinds")) as pool:
        yield pool


def row(task: int, **fields: Any) -> Row:
    return Row({"task": task, **fields}, "rows.jsonl", task + 1, task)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    text = json.dumps({"name": name, "arguments": arguments})
    return turn(f"<tool_call>{text}</tool_call>")


def test_a_tasksets_tool_server_answers_calls_and_its_rewards_count(shop):
    remote = shop.open()
    rows = [json.loads(line) for line in (SHOP / "rows.jsonl").read_text().splitlines()]
    start = remote.reset(Row(rows[1], "rows.jsonl", 2, 1), (), 5)
    assert start["messages"][-1]["content"].startswith("What do 2 x book and 3 x lamp cost")
    assert [each["function"]["name"] for each in start["tools"]] == ["shop_price"]
    answer = remote.step(call("shop_price", item="book"))["messages"]
    assert [(each["role"], each["content"]) for each in answer] == [("tool", "12")]
    faulty = remote.step(call("shop_price", thing="book"))
    assert [each["status"] for each in faulty["calls"]] == ["bad_arguments"]
    end = remote.step(turn("They cost 99."))
    assert (end["done"], end["parts"]) == (True, {"right_total": 1.0, "asked": 0.1})
    assert end["reward"] == pytest.approx(1.1)
    remote.close()


def test_after_max_turns_verifiers_ends_the_episode_and_scores_it(shop):
    remote = shop.open()
    remote.reset(row(1), (), 5)
    replies = [remote.step(call("shop_price", item="book") | {"number": number}) for number in range(3)]
    assert [reply["done"] for reply in replies] == [False, False, True]
    assert replies[-1]["reward"] == pytest.approx(0.1), "it asked, and gave no total"
    remote.close()


def test_rows_of_another_taskset_are_refused(shop):
    for wrong, reason in ((row(99), "from 0 to 23"), (row(1, hash="0"), "is not the one that the rows were made from")):
        remote = shop.open()
        with pytest.raises(EnvironmentDiedError, match=reason):
            remote.reset(wrong, (), 5)
        remote.close()


def test_weights_metrics_and_system_messages(kinds):
    remote = kinds.open()
    start = remote.reset(row(0), (), 5)
    assert [each["role"] for each in start["messages"]] == ["system", "user"]
    assert start["tools"] == []
    end = remote.step(turn("short"))
    assert end["reward"] == 2.5
    assert end["parts"] == {"scored": 0.5, "short": 2.0, "metric/letters": 5.0}
    remote.close()


@pytest.mark.parametrize(
    ("task", "reason"), [(1, "scored is nan, not a finite number"), (2, "SystemExit"), (3, "no such thing")]
)
def test_a_broken_reward_is_a_failed_rollout_and_others_go_on(kinds, task, reason):
    broken, other = kinds.open(), kinds.open()
    broken.reset(row(task), (), 5)
    other.reset(row(0), (), 5)
    with pytest.raises(EnvironmentDiedError, match=reason):
        broken.step(turn("something"))
    assert other.step(turn("something long"))["reward"] == 0.5
    broken.close()
    other.close()


def test_several_agents_are_refused(place):
    with (
        pytest.raises(RewardError, match="has the agents first, second; one agent can be trained"),
        EnvironmentPool(settings(place, "twice")),
    ):
        pass


def test_classes_of_old_versions_are_refused_by_name(place):
    with (
        pytest.raises(RewardError, match=r"uses SingleTurnEnv of verifiers before its v1 API|uses load_environment"),
        EnvironmentPool(settings(place, "old_env")),
    ):
        pass


def test_an_interpreter_without_verifiers_says_what_to_install(place):
    with (
        pytest.raises(RewardError, match=r"has no verifiers 0\.4 .*pip install 'verifiers>=0\.4,<0\.5'"),
        EnvironmentPool(settings(place, "kinds", Path(sys.executable))),
    ):
        pass


def test_the_rows_of_the_example_are_those_of_its_taskset(tmp_path: Path):
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    command = [str(PYTHON), "-m", "trainer.environments.verifiers_rows", "shop_tasks"]
    done = subprocess.run(
        command, cwd=SHOP, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (SHOP / "rows.jsonl").read_text()


def test_torch_is_never_imported(place, tmp_path: Path):
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    text = (
        "import sys; from trainer.environments import zygote\n"
        "zygote._environment({'environment': {'verifiers': 'kinds', 'config': {}, 'max_turns': 2}, 'base_dir': '.'})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([str(PYTHON), "-c", text], cwd=place, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
