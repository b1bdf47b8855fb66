"""Tasksets of verifiers 0.4 as environments: `rollout.environment: {verifiers: TASKSET, python: INTERPRETER}`.

verifiers calls the model, whereas our environments are asked by the trainer. The adapter turns one into the other: an
episode runs in a thread, each of its model calls waits in a `PolicyEndpoint`, `reset` and `step` return what the call
asks, and the next turn answers it. Rewards come from the trace of verifiers. Everything runs in the interpreter that
the recipe names, where verifiers is installed and torch need not be.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import queue
import random
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final

from trainer.environments.contract import Observation, Start, Turn
from trainer.environments.policy_endpoint import MODEL, PolicyEndpoint, PolicyRequest
from trainer.errors import RewardError
from trainer.types import Row

OLD: Final = (
    "SingleTurnEnv", "MultiTurnEnv", "ToolEnv", "StatefulToolEnv", "SandboxEnv", "PythonEnv", "EnvGroup", "Rubric",
    "RubricGroup", "JudgeRubric", "ToolRubric", "Parser", "ThinkParser", "XMLParser", "load_environment",
)  # fmt: skip
"""Names of verifiers before its v1 API."""
KEY: Final = "TUNESMITH_POLICY_KEY"
HARNESS: Final = "tunesmith_harness"
POLL_S: Final = 0.005


def verifiers_environment(taskset: str, config: Mapping[str, Any], max_turns: int) -> type[Any]:
    """An environment class that plays a taskset's tasks; the row's `task` says which.

    Args:
        taskset: id of a v1 taskset, or a module beside the recipe.
        config: fields of the taskset's own configuration.
        max_turns: model calls of an episode; then verifiers ends and scores it.

    Raises:
        RewardError: verifiers or the taskset cannot be used.
    """
    environment, tasks = load_tasks(taskset, config, max_turns)

    class VerifiersEnvironment:
        """One episode."""

        def reset(self, row: Row, *, seed: int) -> Start:
            """Start the episode; its first model call is the prompt."""
            number = row["task"]
            if not isinstance(number, int) or not 0 <= number < len(tasks):
                raise ValueError(f"`task` must be a whole number from 0 to {len(tasks) - 1} (got {number!r})")
            if "hash" in row and row["hash"] != tasks[number].hash:
                raise ValueError(f"task {number} of {taskset} is not the one that the rows were made from")
            random.seed(seed)
            self.episode = Episode(environment, tasks[number])
            request = self.episode.next_request()
            if request is None:
                raise RuntimeError("the episode ended without asking the model")
            self.pending, self.history = request, list(map(_plain, request.body["messages"]))
            return Start(self.history, tools=tuple(request.body.get("tools") or ()))

        def step(self, turn: Turn) -> Observation:
            """Answer the model call that waits; return what the next one adds, or the episode's reward."""
            answer = _answer(turn)
            self.pending.answer(answer)
            self.history.append(_plain(answer))
            request = self.episode.next_request()
            if request is None:
                reward, parts = self.episode.score()
                return Observation([], done=True, reward=reward, parts=parts)
            messages = list(map(_plain, request.body["messages"]))
            seen = len(self.history)
            if list(map(_said, messages[:seen])) != list(map(_said, self.history)) or len(messages) == seen:
                raise RuntimeError("the harness rewrote the conversation; only conversations that grow can be trained")
            self.pending, self.history = request, messages
            return Observation(messages[seen:], done=False)

    return VerifiersEnvironment


def load_tasks(taskset: str, config: Mapping[str, Any], max_turns: int) -> tuple[Any, list[Any]]:
    """The environment of verifiers, and its tasks.

    Args:
        taskset: its id.
        config: fields of its own configuration.
        max_turns: model calls of an episode.

    Raises:
        RewardError: verifiers or the taskset cannot be used.
    """
    try:
        import_module("verifiers.v1")
    except ImportError as error:
        raise RewardError(
            f"verifiers {taskset}: {sys.executable} has no verifiers 0.4 ({error}); make an environment of its own, "
            "`python -m venv verifiers-venv && verifiers-venv/bin/pip install 'verifiers>=0.4,<0.5'`, and name its "
            "interpreter as `python`"
        ) from None
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.utils.loaders import default_harness_id, env_config_type, load_environment, resolve_env_config

    sys.modules[HARNESS] = import_module("trainer.environments.verifiers_harness")
    try:
        own = default_harness_id(taskset)
        agent = {
            "harness": {"id": HARNESS if own == "bash" else own},
            "runtime": {"type": "subprocess"},
            "max_turns": max_turns,
        }
        fields = env_config_type(taskset).model_fields
        seats = [name for name, field in fields.items() if isinstance(field.default, AgentConfig)]
        if len(seats) != 1:
            raise RewardError(f"verifiers {taskset}: has the agents {', '.join(seats)}; one agent can be trained")
        settings = {"taskset": {"id": taskset, **config}, seats[0]: agent, "interception": {"type": "server"}}
        environment = load_environment(resolve_env_config(settings))
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"verifiers {taskset}: {_reason(taskset, error)}") from None
    if type(environment.taskset).INFINITE:
        raise RewardError(f"verifiers {taskset}: an endless taskset; rows must name tasks of a finite one")
    return environment, list(environment.taskset)


def _reason(taskset: str, error: Exception) -> str:
    module = sys.modules.get(taskset.replace("-", "_").lower())
    text = f"{type(error).__name__}: {error}"
    old = [name for name in OLD if f"'{name}'" in text or (module is not None and hasattr(module, name))]
    if old:
        return (
            f"uses {old[0]} of verifiers before its v1 API, which version 0.4 no longer has; port it to a "
            "Taskset of `verifiers.v1`"
        )
    return text


class Episode:
    """An episode of verifiers in a thread of its own."""

    def __init__(self, environment: Any, task: Any) -> None:
        """Start it.

        Args:
            environment: of verifiers.
            task: of its taskset.
        """
        self._endpoint = PolicyEndpoint()
        self._environment, self._task = environment, task
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._result: Any = None
        os.environ[KEY] = self._endpoint.key
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
        threading.Thread(target=self._play, daemon=True).start()

    def next_request(self) -> PolicyRequest | None:
        """The model call that waits now, or None once the episode has ended.

        Raises:
            RuntimeError: it asks twice at the same time, or it failed.
        """
        while True:
            try:
                request = self._endpoint.calls.get(timeout=POLL_S)
            except queue.Empty:
                if self._done.is_set() and self._endpoint.calls.empty():
                    break
                continue
            if not self._endpoint.calls.empty():
                raise RuntimeError("the episode calls the model twice at the same time; only one agent can be trained")
            return request
        if self._error is not None:
            raise RuntimeError(f"the episode ended with {type(self._error).__name__}: {self._error}")
        return None

    def score(self) -> tuple[float, dict[str, float]]:
        """The reward of the trace, and its parts.

        Raises:
            RuntimeError: the episode failed, has several trained agents, or a reward that is no finite number.
        """
        if not self._result.ok:
            errors = [*self._result.errors, *(each for trace in self._result.traces for each in trace.errors)]
            raise RuntimeError("; ".join(f"{each.type}: {each.message}" for each in errors) or "the episode failed")
        traces = [trace for trace in self._result.traces if trace.agent is None or trace.agent.trainable]
        if len(traces) != 1:
            raise RuntimeError(f"the episode has {len(traces)} trained agents; one can be trained")
        rewards = {name: reward for name, reward in traces[0].rewards.items() if reward is not None}
        parts = {name: float(reward.value) for name, reward in rewards.items()}
        parts |= {f"metric/{name}": float(value) for name, value in traces[0].metrics.items() if value is not None}
        broken = [name for name, value in parts.items() if not math.isfinite(value)]
        if broken:
            raise RuntimeError(f"{broken[0]} is {parts[broken[0]]}, not a finite number")
        return float(traces[0].reward), parts

    def _play(self) -> None:
        try:
            self._result = asyncio.run(self._run())
        except BaseException as error:  # SystemExit too: it ends a thread without a word
            self._error = error
        finally:
            self._done.set()

    async def _run(self) -> Any:
        from verifiers.v1.clients import ModelContext
        from verifiers.v1.configs.client import EvalClientConfig

        client = EvalClientConfig(base_url=self._endpoint.url, api_key_var=KEY)
        async with self._environment.serving():
            return await self._environment.run_episode(self._task, ModelContext(model=MODEL, client=client))


def _answer(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.message["content"]}
    if turn.calls and all(call.status == "ok" for call in turn.calls):  # otherwise the recipe takes it as an answer
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
            }
            for call in turn.calls
        ]
    return message


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the chat API as chat templates take it: text content, arguments as objects."""
    plain = {name: message[name] for name in ("role", "name", "tool_call_id") if message.get(name)}
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise RuntimeError("a message has content that is no text")
        content = "".join(part["text"] for part in content)
    plain["content"] = content
    if message.get("tool_calls"):
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": call["id"],
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.loads(call["function"]["arguments"] or "{}"),
                },
            }
            for call in message["tool_calls"]
        ]
    return plain


def _said(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """By what two messages are equal."""
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", ())
    return message["role"], message["content"], [call["function"] for call in calls]
