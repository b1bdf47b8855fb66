"""Tool calls: which tools an answer may call, and the rules by which their arguments are always valid.

The form is that of Qwen, Hermes and SmolLM3: <tool_call>, a line with {"name": ..., "arguments": ...}, </tool_call>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from trainer.data.template import ChatTemplate
from trainer.serve.api_errors import ApiError
from trainer.serve.models import Served
from trainer.serve.readers import CLOSE, OPEN
from trainer.serve.requests import ChatRequest
from trainer.serve.structure import FORM, ending, json_grammar, literal

NAME: Final = re.compile(r"[\w-]{1,64}", re.ASCII)
"""Of a function."""


def tools_of(request: ChatRequest, served: Served) -> list[dict[str, Any]]:
    """The tools that the answer may call; empty where there are none, or `tool_choice` is none.

    Raises:
        ApiError: a tool cannot be guaranteed, or the model's template has no form of calls that is read.
    """
    if not request.tools:
        if request.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return []
    for index, tool in enumerate(request.tools):
        _check(tool, f"tools[{index}]")
    if request.tool_choice == "none":
        return []
    if request.response_format is not None and request.response_format.type != "text":
        raise ApiError(400, "response_format and tools exclude each other", param="response_format")
    template = None if served.encoder is None else served.encoder.template
    if template is None or not writes_json_calls(template):
        form = f'{OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}'
        raise ApiError(400, f"the chat template of {served.name} does not write calls as {form}", param="tools")
    return _chosen(request)


def _check(tool: Mapping[str, Any], place: str) -> None:
    """Refuse a tool whose arguments cannot be guaranteed."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise ApiError(400, f"{place} must be of type function", param="tools")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ApiError(400, f"{place}.function.name must have 1 to 64 letters, digits, _ or -", param="tools")
    if not isinstance(parameters, Mapping | None):
        raise ApiError(400, f"{place}.function.parameters must be a JSON Schema", param="tools")
    if parameters_of(function)["type"] != "object":
        raise ApiError(400, f"{place}.function.parameters must be of type object", param="tools")
    json_grammar(parameters_of(function), param=f"{place}.function.parameters")


def _chosen(request: ChatRequest) -> list[dict[str, Any]]:
    """All tools, or the one that `tool_choice` names."""
    tools: list[dict[str, Any]] = list(request.tools or [])
    if not isinstance(request.tool_choice, Mapping):
        return tools
    function = request.tool_choice.get("function")
    if request.tool_choice.get("type") != "function" or not isinstance(function, Mapping):
        raise ApiError(400, "tool_choice must be none, auto, required or one function", param="tool_choice")
    name = function.get("name")
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    return named


def tool_rules(request: ChatRequest, tools: Sequence[Mapping[str, Any]], added: Mapping[str, int]) -> list[str]:
    """Rules of an answer, `answer` first: text and calls for `auto`, calls alone where one is required.

    Args:
        request: says `tool_choice` and whether several calls are allowed.
        tools: from `tools_of`.
        added: tokens that were added to the vocabulary.
    """
    is_single, is_required = request.parallel_tool_calls is False, request.tool_choice not in (None, "auto")
    opened, closed = literal(OPEN, added), literal(CLOSE, added)
    rules = [f'call: {opened} body {closed} "\\n"?']
    if is_required:
        rules.insert(0, f"answer: call{'' if is_single else '+'}")
    else:
        others = "" if is_single else ' "\\n"? call*'
        rules.insert(0, f"answer: PLAIN | begun body {closed}{others}")
        rules.append(ending("begun", "PLAIN", OPEN, added))
    names = [f"call_{index}" for index in range(len(tools))]
    rules.append("body: " + " | ".join(names))
    for name, tool in zip(names, tools, strict=True):
        function = tool["function"]
        head = json.dumps(f'\n{{"name": {json.dumps(function["name"])}, "arguments": ')
        schema = {**parameters_of(function), "x-guidance": FORM}
        rules.append(f'{name}: {head} %json {json.dumps(schema)} "}}\\n"')
    return rules


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object."""
    return {"type": "object", **(function.get("parameters") or {})}


@lru_cache(maxsize=64)
def writes_json_calls(template: ChatTemplate) -> bool:
    """Whether a template writes calls as JSON between `OPEN` and `CLOSE`.

    Other models write a tag for each argument between the same tags (Qwen3.5, GLM 4.5).
    """
    call = {"type": "function", "id": "call_0", "function": {"name": "zqname", "arguments": {"zqkey": "zqvalue"}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = template.chat(chat, None, {}).text
    except Exception:  # a template raises whatever its author thought of
        return False
    form = r'\{"name": "zqname", "arguments": \{"zqkey": "zqvalue"\}\}'
    return re.search(rf"{OPEN}\s*{form}\s*{CLOSE}", text) is not None
