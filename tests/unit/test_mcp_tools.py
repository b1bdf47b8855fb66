"""MCP servers as tools: a real server over stdio for each rollout, by the official client."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from obedient import ENVIRONMENT, ROW, settings, turn

from trainer.config.recipe import RFTRecipe
from trainer.config.turn_settings import turn_findings
from trainer.environments.mcp_tools import McpSettings
from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool
from trainer.errors import RewardError
from trainer.planning.identity import environment_digests

COMMAND = (sys.executable, "mcp_server.py")
ASK = ({"role": "user", "content": "go"},)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mcp")
    (directory / "mine.py").write_text(ENVIRONMENT)
    shutil.copy(Path(__file__).with_name("mcp_server.py"), directory)
    return directory


def served(place: Path, *, only: tuple[str, ...] = (), **changes: Any) -> Any:
    servers = (McpSettings(COMMAND, only, {"COLOR": "blue"}),)
    return settings(place, **{"environment": None, "servers": servers, "timeout_s": 60.0, **changes})


@pytest.fixture(scope="module")
def pool(place: Path) -> Iterator[EnvironmentPool]:
    with EnvironmentPool(served(place, memory_limit_gib=2.0)) as started:
        yield started


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    text = str({"name": name, "arguments": arguments}).replace("'", '"')
    return turn(f"<tool_call>{text}</tool_call>")


def said(reply: dict[str, Any]) -> str:
    return str(reply["messages"][0]["content"])


def test_a_rollout_has_a_server_of_its_own_that_ends_with_it(pool):
    """Also: faulty calls have a status, failing tools tell the policy, a server that ends fails its rollout."""
    first, second = pool.open(), pool.open()
    replies = pool.map(lambda remote: remote.reset(ROW, ASK, 1), [first, second])
    assert [reply["tools"] for reply in replies] == [pool.schemas] * 2
    names = [schema["function"]["name"] for schema in pool.schemas]
    assert names == ["add", "count", "fail", "die", "sleep", "hoard", "draw", "variable"]
    assert pool.schemas[0]["function"]["description"] == "Add two whole numbers."
    assert pool.schemas[0]["function"]["parameters"]["required"] == ["a"]
    assert said(first.step(call("add", a=40, b=2))) == "42"
    assert said(first.step(call("add", a=40))) == "41"
    calls, pid = said(first.step(call("count"))).split()
    others, other_pid = said(second.step(call("count"))).split()
    assert (calls, others) == ("2", "0")
    assert pid != other_pid
    reply = first.step(call("add", a="four"))
    assert [each["status"] for each in reply["calls"]] == ["bad_arguments"]
    assert said(reply) == "error: a: 'four' is not of type 'integer'"
    assert [each["status"] for each in first.step(call("sub", a=1))["calls"]] == ["unknown_tool"]
    assert "no such city" in said(first.step(call("fail", text="no such city")))
    assert said(first.step(call("variable", name="COLOR"))) == "blue"
    assert said(first.step(call("variable", name="PYTHONPATH"))) == "unset", "the trainer's own are not handed on"
    first.close()
    assert not psutil.pid_exists(int(pid))
    with pytest.raises(EnvironmentDiedError, match="has ended"):
        second.step(call("die"))
    second.close()


@pytest.mark.heavy
def test_a_tool_that_returns_an_image_is_a_failed_rollout(pool):
    remote = pool.open()
    remote.reset(ROW, ASK, 1)
    with pytest.raises(EnvironmentDiedError, match="returned image; only text can be used"):
        remote.step(call("draw"))
    remote.close()


@pytest.mark.heavy
def test_a_server_has_the_memory_limit_of_its_rollout(pool):
    remote = pool.open()
    remote.reset(ROW, ASK, 1)
    assert said(remote.step(call("hoard"))).startswith("error: ")
    remote.close()


@pytest.mark.heavy
def test_a_server_that_hangs_ends_with_its_rollout(place):
    with EnvironmentPool(served(place, only=("count", "sleep"), timeout_s=15.0)) as pool:
        assert [schema["function"]["name"] for schema in pool.schemas] == ["count", "sleep"]
        remote = pool.open()
        remote.reset(ROW, ASK, 1)
        pid = int(said(remote.step(call("count"))).split()[1])
        remote._timeout_s = 1.0
        with pytest.raises(EnvironmentDiedError, match="no answer within 1 s"):
            remote.step(call("sleep"))
        wait_until_gone(pid)


@pytest.mark.heavy
def test_a_server_dies_with_a_rollout_that_is_killed(place):
    with EnvironmentPool(served(place)) as pool:
        remote = pool.open()
        remote.reset(ROW, ASK, 1)
        pid = int(said(remote.step(call("count"))).split()[1])
        os.kill(remote._pid, 9)
        wait_until_gone(pid)
        remote.close()


@pytest.mark.heavy
def test_an_environment_may_have_a_server_too_but_no_two_tools_of_one_name(place):
    with EnvironmentPool(served(place, environment="mine.py:Obedient")) as pool:
        remote = pool.open()
        remote.reset(ROW, (), 1)
        assert said(remote.step(call("add", a=1, b=2))) == "3"
        assert said(remote.step(turn("go"))) == "1 1", "a turn without a call goes to the environment"
        remote.close()
    with EnvironmentPool(served(place, tools=("mine.py:add",))) as pool:
        remote = pool.open()
        with pytest.raises(EnvironmentDiedError, match="two tools are called 'add'"):
            remote.reset(ROW, ASK, 1)
        remote.close()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("command", "only", "reason"),
    [
        ((sys.executable, "-c", "raise SystemExit(4)"), (), "did not start"),
        (("no-such-program",), (), "did not start"),
        (COMMAND, ("add", "subtract"), "has no tool subtract; it has add, count"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_at_the_start(place, command, only, reason):
    servers = (McpSettings(command, only, {}),)
    with (
        pytest.raises(RewardError, match=reason),
        EnvironmentPool(settings(place, environment=None, servers=servers)),
    ):
        pass


def test_check_refuses_commands_that_cannot_run(place, monkeypatch):
    def findings(**tool: Any) -> list[str]:
        fields = {"name": "a", "method": "rft", "model": {"path": "m"}, "data": {"train": "r.jsonl"}}
        rewards = [{"use": "last_number"}]
        recipe = RFTRecipe.model_validate({**fields, "rewards": rewards, "rollout": {"tools": [tool]}})
        found = turn_findings(recipe, place)
        assert all(each.path == ("rollout", "tools", 0, "mcp") for each in found)
        if not found:
            assert environment_digests(recipe, place)["mcp_server.py"].startswith("sha256:")
        return [each.text for each in found]

    assert findings(mcp=f"{sys.executable} mcp_server.py") == []
    assert findings(mcp=list(COMMAND)) == []
    assert "there is no program 'no-such-program'" in findings(mcp="no-such-program x")[0]
    assert "file absent.py is not in" in findings(mcp=f"{sys.executable} absent.py")[0]
    assert "cannot be split into words" in findings(mcp="python 'server.py")[0]
    assert "is empty" in findings(mcp="")[0]
    monkeypatch.setattr("trainer.config.turn_settings.find_spec", lambda _name: None)
    assert 'pip install "tunesmith[mcp]"' in findings(mcp="python server.py")[0]


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
