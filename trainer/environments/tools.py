"""Typed functions as tools: a JSON schema from the signature, arguments checked against it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from trainer.errors import RewardError
from trainer.types import ToolCall


@final
@dataclass(frozen=True)
class Tool:
    """A function that the policy can call."""

    name: str
    function: Callable[..., Any]
    arguments: type[BaseModel]
    """Checks the arguments of a call."""
    schema: Mapping[str, Any]
    """As a chat template shows it."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """Make a tool from the signature and the docstring's first paragraph.

        Raises:
            RewardError: a parameter has no type, or the function takes *args or **kwargs.
        """
        name = function.__name__
        parameters = inspect.signature(function).parameters
        hints = get_type_hints(function)
        for parameter in parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise RewardError(f"tool {name}: parameter {parameter} cannot be named in a call; give it a name")
            if parameter.name not in hints:
                raise RewardError(f"tool {name}: parameter `{parameter.name}` has no type; write one, such as `: int`")
        fields: dict[str, Any] = {
            each.name: (hints[each.name], ... if each.default is each.empty else each.default)
            for each in parameters.values()
        }
        model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        described = {"name": name, "description": _first_paragraph(function), "parameters": _untitled(model)}
        return cls(name, function, model, {"type": "function", "function": described})


def check_call(call: ToolCall, tools: Mapping[str, Tool]) -> ToolCall:
    """The call with its status: whether the tool exists and takes these arguments."""
    if call.status != "ok":
        return call
    tool = tools.get(call.name)
    if tool is None:
        known = ", ".join(tools) or "there are none"
        return replace(call, status="unknown_tool", problem=f"no tool is called {call.name!r}; tools: {known}")
    try:
        tool.arguments.model_validate(dict(call.arguments))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return replace(call, status="bad_arguments", problem=problems)
    return call


def run_call(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """Call a tool; what it returned or raised, as text for the policy."""
    tool = tools[call.name]
    checked = tool.arguments.model_validate(dict(call.arguments))
    arguments = {name: getattr(checked, name) for name in type(checked).model_fields}
    try:
        value = tool.function(**arguments)
    except Exception as error:  # the policy's arguments caused it: 1/0 in a calculator
        return f"error: {type(error).__name__}: {error}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def tools_of(functions: Sequence[Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by name.

    Raises:
        RewardError: two have one name, or a signature cannot be described.
    """
    tools: dict[str, Tool] = {}
    for function in functions:
        tool = Tool.of(function)
        if tool.name in tools:
            raise RewardError(f"two tools are called {tool.name!r}; rename one of the functions")
        tools[tool.name] = tool
    return tools


def _first_paragraph(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")


def _untitled(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without pydantic's titles, which only repeat the names."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: clean(each) for name, each in value.items() if not (name == "title" and isinstance(each, str))
            }
        return [clean(each) for each in value] if isinstance(value, list) else value

    schema: dict[str, Any] = clean(model.model_json_schema())
    schema.pop("additionalProperties", None)
    return schema
