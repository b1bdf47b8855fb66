"""Any body is answered or refused with a 4xx that names the parameter: nothing else comes out of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import tiny_model_dir

from trainer.config.recipe import ModelSettings
from trainer.inference.source import ModelSource, plain_data
from trainer.serve.answers import ChatAnswer
from trainer.serve.api_errors import ApiError
from trainer.serve.choices import Job
from trainer.serve.engine_client import EngineClient
from trainer.serve.gateway import Gateway, Limits
from trainer.serve.models import ServedModels
from trainer.serve.requests import ChatRequest, CompletionRequest, validation_error

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    """What renders and checks requests, without an engine behind it."""
    path = tiny_model_dir(tmp_path_factory.mktemp("requests") / "m")
    source = ModelSource("m", ModelSettings(path=str(path), compute_dtype="float32"), plain_data())
    client = EngineClient()
    client.hello = {"vocab": 320, "window": 512}  # as the engine says it
    return Gateway(ServedModels(source, "m"), client, Limits())


def jobs_of(gateway: Gateway, kind: type[ChatRequest | CompletionRequest], body: Any) -> list[Job] | ApiError:
    """What the gateway makes of a body."""
    try:
        request = kind.model_validate(body)
        if isinstance(request, CompletionRequest):
            return gateway.completion_jobs(request)
        jobs = gateway.chat_jobs(request)
        ChatAnswer(request, jobs[0].served, jobs[0].reasoning)
        return jobs
    except ValidationError as error:
        return validation_error(list(error.errors()))
    except ApiError as error:
        return error


JUNK = st.recursive(
    st.sampled_from([None, True, False, -1, 0, 1, 3, 10**30, -(2**63), 0.5, 1e308, -1e308, float("nan"), float("inf")])
    | st.sampled_from(["", "x", "none", "user", "\x00", "\ud800", "<|im_end|>", "9" * 5000, "٣", "{{ 1 }}", "function"])
    | st.just(TOOL),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "name", "function", "schema", "json_schema", "tool_calls", "$ref"]
            )
            | st.sampled_from(
                ["conversations", "tools", "chat_template", "messages", "enable_thinking", "5", "arguments", "id"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
CHAT_FIELDS = [*ChatRequest.model_fields, "unknown", "response_format", "messages"]
TEXT_FIELDS = [*CompletionRequest.model_fields, "unknown"]


def checked(found: list[Job] | ApiError) -> None:
    if isinstance(found, ApiError):
        assert 400 <= found.status < 500
        assert found.body()["error"]["type"] in {"invalid_request_error", "not_found_error"}
        assert found.param or found.message
        json.dumps(found.body(), ensure_ascii=False).encode()
    else:
        assert found
        assert all(0 <= token < 320 for job in found for token in job.prompt)
        json.dumps([job.sampling.to_json() for job in found], allow_nan=False).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(CHAT_FIELDS), JUNK, max_size=3))
def test_no_chat_breaks_the_gateway(gateway: Gateway, changes: dict[str, Any]) -> None:
    checked(jobs_of(gateway, ChatRequest, CHAT | changes))


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"])},
    optional={
        "content": JUNK,
        "tool_calls": JUNK,
        "tool_call_id": JUNK,
        "name": JUNK,
        "reasoning_content": JUNK,
        "refusal": JUNK,
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(MESSAGE, min_size=1, max_size=3))
def test_no_message_breaks_the_gateway(gateway: Gateway, messages: list[Any]) -> None:
    checked(jobs_of(gateway, ChatRequest, CHAT | {"messages": messages}))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(TEXT_FIELDS), JUNK, max_size=2))
def test_no_completion_breaks_the_gateway(gateway: Gateway, changes: dict[str, Any]) -> None:
    checked(jobs_of(gateway, CompletionRequest, TEXT | changes))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("kind", "change", "param"),
    [
        (ChatRequest, {"n": 10**9}, "n"),
        (ChatRequest, {"n": 0}, "n"),
        (ChatRequest, {"max_tokens": -1}, "max_tokens"),
        (ChatRequest, {"max_tokens": 10**30}, "messages"),
        (ChatRequest, {"temperature": float("nan")}, "temperature"),
        (ChatRequest, {"seed": 10**30}, "seed"),
        (ChatRequest, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (ChatRequest, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (ChatRequest, {"unknown": 1}, "unknown"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (ChatRequest, {"tools": [{}]}, "tools"),
        (ChatRequest, {"tool_choice": "required"}, "tool_choice"),
        (ChatRequest, {"model": "\ud800"}, "model"),
        (ChatRequest, {"response_format": {"type": "json_schema"}}, "response_format"),
        (ChatRequest, {"response_format": as_format(nested(2000))}, "response_format"),
        (ChatRequest, {"chat_template_kwargs": {"conversations": 1}}, "messages"),
        (CompletionRequest, {"prompt": []}, "prompt"),
        (CompletionRequest, {"prompt": [[]]}, "prompt"),
        (CompletionRequest, {"prompt": [320]}, "prompt"),
        (CompletionRequest, {"prompt": ["x"] * 100, "n": 100}, "prompt"),
        (CompletionRequest, {"prompt": "\ud800"}, "prompt"),
        (CompletionRequest, {"echo": True, "stream": True}, "echo"),
    ],
)  # fmt: skip
def test_a_refusal_names_its_parameter(gateway: Gateway, kind: Any, change: dict[str, Any], param: str) -> None:
    found = jobs_of(gateway, kind, (CHAT if kind is ChatRequest else TEXT) | change)
    assert isinstance(found, ApiError)
    assert (found.param, found.status) == (param, 404 if param == "model" else 400)
