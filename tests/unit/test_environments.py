"""Environments: whatever one does, only its own rollout fails; tools have a status for every faulty call."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from obedient import ENVIRONMENT, ROW, TELL, settings, turn

from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool
from trainer.environments.tool_calls import parse_turn, same_turn
from trainer.environments.tools import check_call, run_call, tools_of
from trainer.environments.trial import play_trials
from trainer.environments.zygote_process import ZygoteDiedError
from trainer.errors import RewardError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("environment")
    (directory / "mine.py").write_text(ENVIRONMENT)
    return directory


@pytest.fixture(scope="module")
def pool(place):
    with EnvironmentPool(settings(place, timeout_s=2.0, memory_limit_gib=0.5)) as started:
        yield started


def test_each_rollout_has_its_own_environment(pool):
    first, second = pool.open(), pool.open()
    for remote, seed in ((first, 7), (second, 8)):
        assert remote.reset(ROW, (), seed)["messages"] == [{"role": "user", "content": "What now?"}]
    said = [remote.step(turn("go"))["messages"][0]["content"] for remote in (first, first, second)]
    assert said == ["1 7", "2 7", "1 8"]
    loaded, parent, own = map(int, first.step(turn("pids"))["messages"][0]["content"].split())
    assert loaded == parent != own, "imported once, by the process that forks"
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "LookupError: no such thing"),
        ("sleep", "no answer within 2 s"),
        ("deaf", "no answer within 2 s"),
        ("exit", "ended itself with status 3"),
        ("sys.exit", "SystemExit"),
        ("segfault", "killed by SIGSEGV"),
        ("hoard", "MemoryError"),
        ("nan", "not finite"),
        ("nothing", "without messages must be done"),
    ],
)
def test_a_dead_environment_says_why_and_others_go_on(pool, text, reason):
    dying, other = pool.open(), pool.open()
    for remote in (dying, other):
        remote.reset(ROW, (), 1)
    with pytest.raises(EnvironmentDiedError, match=reason) as caught:
        dying.step(turn(text))
    assert "step of turn 0" in str(caught.value)
    assert other.step(turn("go"))["messages"][0]["content"] == "1 1"
    dying.close()
    other.close()


def test_a_print_corrupts_no_answer(pool):
    remote = pool.open()
    remote.reset(ROW, (), 1)
    assert remote.step(turn("print"))["messages"][0]["content"] == "printed"
    remote.close()


def test_closing_the_pool_ends_what_environments_started(place):
    with EnvironmentPool(settings(place)) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 1)
        own = int(remote.step(turn("pids"))["messages"][0]["content"].split()[2])
        remote.step(turn("children"))
    for _ in range(100):
        if not Path(f"/proc/{own}").exists() and not _is_running("sleep\0986"):
            return
        time.sleep(0.05)
    pytest.fail("the environment or its child outlived the pool")


def _is_running(command: str) -> bool:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if (directory / "cmdline").read_text().startswith(command):
                return True
        except OSError:
            continue
    return False


def test_a_dead_zygote_is_an_error_of_the_run(place):
    with EnvironmentPool(settings(place)) as pool:
        pool.open().close()
        os.kill(pool.zygote_pid, signal.SIGKILL)
        with pytest.raises(ZygoteDiedError, match="process that starts environments has ended"):
            pool.open()


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        ("mine.py:Obedien", "has no class `Obedien`; did you mean `Obedient`"),
        ("mine.py:NoStep", r"has no method `step\(turn\)`"),
        ("mine.py:add", "is a function, not a class"),
    ],
)
def test_what_is_no_environment_is_refused_at_the_start(place, use, problem):
    with pytest.raises(RewardError, match=problem), EnvironmentPool(settings(place, environment=use)):
        pass


def test_a_group_is_compared_by_the_environment(pool):
    row = {"fields": {}, "file": "f", "line": 1, "index": 0}
    rollouts = [{"row": row, "messages": [], "reward": reward, "stop": "done"} for reward in (0.25, 0.75)]
    remote = pool.open()
    assert remote.compare(rollouts) == [0.0, 1.0]
    remote.close()


def test_tools_answer_and_faulty_calls_are_told(place):
    tools = ("mine.py:add", "mine.py:divide")
    with EnvironmentPool(settings(place, environment=None, tools=tools)) as pool:
        remote = pool.open()
        prompt = [{"role": "user", "content": "2+3?"}]
        started = remote.reset(ROW, prompt, 0)
        assert started["messages"] == prompt
        assert [tool["function"]["name"] for tool in started["tools"]] == ["add", "divide"]
        said = {
            '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>': ("ok", "5"),
            '<tool_call>{"name": "divide", "arguments": {"a": 1, "b": 0}}</tool_call>': (
                "ok",
                "error: ZeroDivisionError",
            ),
            '<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>': ("bad_arguments", "error: a:"),
            '<tool_call>{"name": "add", "arguments": {"a": 1, "c": 1}}</tool_call>': ("bad_arguments", "error: c:"),
            '<tool_call>{"name": "sub", "arguments": {}}</tool_call>': ("unknown_tool", "error: no tool is called"),
            "<tool_call>{'name': 'add'}</tool_call>": ("invalid_json", "error: the call is no JSON"),
            '<tool_call>{"name": "add"': ("unclosed", "error: the call does not end"),
        }
        for text, (status, begin) in said.items():
            observed = remote.step(turn(text))
            assert not observed["done"]
            assert observed["calls"][0]["status"] == status, text
            assert observed["messages"][0]["role"] == "tool"
            assert observed["messages"][0]["content"].startswith(begin), text
        assert remote.step(turn("It is 5."))["done"], "an answer without calls ends a rollout that has only tools"
        remote.close()


@pytest.mark.parametrize(("way", "done", "asked"), [("end", True, False), ("answer", False, True)])
def test_the_recipe_chooses_what_follows_a_faulty_call(place, way, done, asked):
    errors = TELL | {"unclosed": way}
    with EnvironmentPool(settings(place, tools=("mine.py:add",), errors=errors)) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 5)
        observed = remote.step(turn("<tool_call>"))
        assert observed["done"] is done
        assert bool(observed["messages"]) is asked
        remote.close()


def test_the_schema_is_the_signature(place):
    namespace: dict[str, Any] = {}
    exec(ENVIRONMENT, namespace)
    tools = tools_of([namespace["add"]])
    assert tools["add"].schema["function"] == {
        "name": "add",
        "description": "Add two whole numbers.",
        "parameters": {
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
            "required": ["a"],
            "type": "object",
        },
    }
    (call,) = parse_turn('<tool_call>{"name": "add", "arguments": {"a": 4}}</tool_call>').calls
    assert run_call(check_call(call, tools), tools) == "5"
    with pytest.raises(RewardError, match="parameter `a` has no type"):
        tools_of([namespace["untyped"]])
    with pytest.raises(RewardError, match="two tools are called 'add'"):
        tools_of([namespace["add"], namespace["add"]])


def test_a_turn_is_the_same_up_to_spacing_but_not_without_its_reasoning():
    written = 'Let me see.\n<tool_call>{"arguments":{"a":1},"name":"add"}</tool_call>'
    rendered = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert same_turn(written, rendered)
    assert not same_turn(written, rendered.replace("1", "2"))
    assert not same_turn("<think>2+2</think>4", "4")


def test_check_plays_gold_garbage_and_silence(pool):
    lines = play_trials(pool, [ROW], lambda row: (), max_turns=2, has_rewards=True)
    assert lines[1] == "  gold     mean reward 1.000, 1 turns, ended: done 1"
    assert lines[2:] == [
        "  garbage  no reward, 2 turns, ended: max_turns 1",
        "  silent   no reward, 2 turns, ended: max_turns 1",
    ]
