"""The endpoint that gives a framework's model calls the turns of a rollout, and environments that run their tools."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from obedient import ROW, settings, turn

from trainer.config.recipe import RFTRecipe
from trainer.config.turn_settings import turn_findings
from trainer.environments.policy_endpoint import PolicyEndpoint
from trainer.environments.pool import EnvironmentDiedError, EnvironmentPool

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
OWN_TOOLS = '''
from trainer.environments.contract import Observation, Start

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

def double(a: int) -> int:
    """Double."""
    return 2 * a

class Owner:
    """Runs the calls of its tools itself."""

    def reset(self, row, *, seed):
        described = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
        return Start([{"role": "user", "content": "go"}], tools=({"type": "function", "function": described},))

    def step(self, turn):
        if not turn.calls:
            return Observation([], done=True, reward=1.0)
        said = " ".join(f"{call.name}({dict(call.arguments)})" for call in turn.calls)
        return Observation([{"role": "tool", "content": said}], done=False)
'''


def post(endpoint: PolicyEndpoint, path: str = "/chat/completions", key: str | None = None, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {endpoint.key if key is None else key}"}
    return httpx.post(endpoint.url + path, json=body, headers=headers, timeout=30, trust_env=False)


def test_a_call_waits_for_the_turn_and_gets_it():
    endpoint = PolicyEndpoint()
    with ThreadPoolExecutor() as threads:
        reply = threads.submit(post, endpoint, messages=[{"role": "user", "content": "hi"}])
        request = endpoint.calls.get(timeout=30)
        assert request.body["messages"] == [{"role": "user", "content": "hi"}]
        assert not reply.done()
        request.answer({"role": "assistant", "content": "", "tool_calls": [CALL]})
        (choice,) = reply.result().json()["choices"]
    assert choice["message"]["tool_calls"] == [CALL]
    assert choice["finish_reason"] == "tool_calls"
    endpoint.close()


def test_a_stream_has_the_whole_turn_in_one_event():
    endpoint = PolicyEndpoint()
    threading.Thread(
        target=lambda: endpoint.calls.get(timeout=30).answer(
            {"role": "assistant", "content": "42", "tool_calls": [CALL]}
        )
    ).start()
    text = post(endpoint, stream=True, messages=[]).text
    events = [line for line in text.split("\n\n") if line]
    assert len(events) == 3
    assert '"content": "42"' in events[0]
    assert '"index": 0, "id": "c1"' in events[0]
    assert '"finish_reason": "tool_calls"' in events[1]
    assert events[2] == "data: [DONE]"
    endpoint.close()


def test_without_the_key_and_on_other_paths_nothing_is_answered():
    endpoint = PolicyEndpoint()
    assert post(endpoint, key="guess", messages=[]).status_code == 401
    assert post(endpoint, path="/responses", messages=[]).status_code == 404
    assert endpoint.calls.empty()
    endpoint.close()


def test_an_environment_may_run_its_tools_itself(tmp_path: Path):
    (tmp_path / "mine.py").write_text(OWN_TOOLS)
    with EnvironmentPool(settings(tmp_path, environment="mine.py:Owner")) as pool:
        remote = pool.open()
        assert [each["function"]["name"] for each in remote.reset(ROW, (), 1)["tools"]] == ["add"]
        good = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        bad = '<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>'
        assert remote.step(turn(good))["messages"][0]["content"] == "add({'a': 1})"
        first, second = remote.step(turn(good + bad, 1))["messages"]
        assert first["content"] == "error: not run, because another call of the turn was faulty"
        assert second["content"] == "error: a: 'x' is not of type 'integer'"
        assert remote.step(turn("done", 2))["reward"] == 1.0
        remote.close()
    with EnvironmentPool(settings(tmp_path, environment="mine.py:Owner", tools=("mine.py:double",))) as pool:
        remote = pool.open()
        with pytest.raises(EnvironmentDiedError, match="runs its tools itself; there can be no others"):
            remote.reset(ROW, (), 1)
        remote.close()


def test_check_refuses_a_taskset_without_interpreter_or_with_other_tools(tmp_path: Path):
    def findings(**rollout: Any) -> list[tuple[Any, str]]:
        fields = {"name": "a", "method": "rft", "model": {"path": "m"}, "data": {"train": "r.jsonl"}}
        recipe = RFTRecipe.model_validate({**fields, "rollout": rollout})
        return [(each.path[1:], each.text) for each in turn_findings(recipe, tmp_path)]

    assert findings(environment={"verifiers": "tasks", "python": "/bin/sh"}) == []
    ((path, text),) = findings(environment={"verifiers": "tasks", "python": "no/such/python"})
    assert path == ("environment", "python")
    assert "no/such/python is no interpreter" in text
    found = dict(findings(environment={"verifiers": "tasks", "python": "/bin/sh"}, tools=["m:f"]))
    assert "has tools of its own" in found["tools",]
