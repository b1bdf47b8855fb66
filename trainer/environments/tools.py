"""Typed functions as tools: a JSON schema from the signature, arguments checked against it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from trainer.errors import RewardError
from trainer.types import ToolCall


@final
@dataclass(frozen=True)
class Tool:
    """What the policy can call: a function, or a tool of an MCP server."""

    name: str
    problem: Callable[[Mapping[str, Any]], str | None]
    """What is wrong with the arguments of a call; None if nothing is."""
    run: Callable[[Mapping[str, Any]], str] | None
    """Runs a call whose arguments are right; what it returned or raised, as text for the policy. None: the environment
    runs it, in `step`."""
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
        return cls(
            name,
            lambda arguments: _problem(model, arguments),
            lambda arguments: _result(function, model, arguments),
            {"type": "function", "function": described},
        )


def described_tool(described: Mapping[str, Any], run: Callable[[Mapping[str, Any]], str] | None) -> Tool:
    """A tool whose arguments a JSON schema describes.

    Args:
        described: `name`, `description` and `parameters`, the schema; nothing that it refers to is fetched.
        run: runs a call; None: the environment does.

    Raises:
        RewardError: the schema is wrong.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry

    schema = described["parameters"]
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise RewardError(f"tool {described['name']}: bad schema: {error.message}") from None
    validator = Draft202012Validator(schema, registry=Registry())  # a registry that fetches nothing

    def problem(arguments: Mapping[str, Any]) -> str | None:
        errors = [f"{'.'.join(map(str, each.path))}: {each.message}" for each in validator.iter_errors(arguments)]
        return "; ".join(error.removeprefix(": ") for error in errors) or None

    return Tool(described["name"], problem, run, {"type": "function", "function": dict(described)})


def check_call(call: ToolCall, tools: Mapping[str, Tool]) -> ToolCall:
    """The call with its status: whether the tool exists and takes these arguments."""
    if call.status != "ok":
        return call
    tool = tools.get(call.name)
    if tool is None:
        known = ", ".join(tools) or "there are none"
        return replace(call, status="unknown_tool", problem=f"no tool is called {call.name!r}; tools: {known}")
    problem = tool.problem(call.arguments)
    return call if problem is None else replace(call, status="bad_arguments", problem=problem)


def run_call(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """Call a tool; what it returned or raised, as text for the policy."""
    run = tools[call.name].run
    return "error: not run, because another call of the turn was faulty" if run is None else run(call.arguments)


def by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name.

    Raises:
        RewardError: two have one name.
    """
    named: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in named:
            raise RewardError(f"two tools are called {tool.name!r}; rename one of them")
        named[tool.name] = tool
    return named


def tools_of(functions: Sequence[Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by name, from functions.

    Raises:
        RewardError: two have one name, or a signature cannot be described.
    """
    return by_name(map(Tool.of, functions))


def _problem(model: type[BaseModel], arguments: Mapping[str, Any]) -> str | None:
    try:
        model.model_validate(dict(arguments))
    except ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return None


def _result(function: Callable[..., Any], model: type[BaseModel], arguments: Mapping[str, Any]) -> str:
    checked = model.model_validate(dict(arguments))
    try:
        value = function(**{name: getattr(checked, name) for name in model.model_fields})
    except Exception as error:  # the policy's arguments caused it: 1/0 in a calculator
        return f"error: {type(error).__name__}: {error}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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
