"""Tool calls: grammars whose arguments are always valid, and calls read from the text of an answer.

The form is that of Qwen, Hermes and SmolLM3: <tool_call>, a line with {"name": ..., "arguments": ...}, </tool_call>.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from trainer.serve.api_errors import ApiError
from trainer.serve.models import Served
from trainer.serve.requests import ChatRequest
from trainer.serve.structure import FORM, json_grammar
from trainer.serve.text import overlap

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
ANY_ARGUMENTS: Final = {"type": "object"}


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
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping) or not function.get("name"):
            raise ApiError(400, f"tools[{index}] must be of type function and have a name", param="tools")
        json_grammar(function.get("parameters") or ANY_ARGUMENTS, param=f"tools[{index}].function.parameters")
    if request.tool_choice == "none":
        return []
    if request.response_format is not None and request.response_format.type != "text":
        raise ApiError(400, "response_format and tools exclude each other", param="response_format")
    if OPEN not in str(served.tokenizer.chat_template) or OPEN in served.tokenizer.all_special_tokens:
        raise ApiError(400, f"the chat template of {served.name} does not write calls as {OPEN}", param="tools")
    return _chosen(request)


def _chosen(request: ChatRequest) -> list[dict[str, Any]]:
    """All tools, or the one that `tool_choice` names."""
    tools: list[dict[str, Any]] = list(request.tools or [])
    if not isinstance(request.tool_choice, Mapping):
        return tools
    name = (request.tool_choice.get("function") or {}).get("name")
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    return named


def tool_grammar(request: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> str:
    """The grammar of an answer: text and calls for `auto`, calls alone where one is required.

    Args:
        request: says `tool_choice` and whether several calls are allowed.
        tools: from `tools_of`.
    """
    more = "" if request.parallel_tool_calls is False else "+"
    is_required = request.tool_choice not in (None, "auto")
    names = [f"call_{index}" for index in range(len(tools))]
    lines = ["%llguidance {}"]
    if is_required:
        lines += [f"start: call{more}", f'call: {json.dumps(OPEN)} body {json.dumps(CLOSE)} "\\n"?']
    else:
        others = ' "\\n"? call*' if more else ""
        lines += [
            f"start: TEXT | begun body {json.dumps(CLOSE)}{others}",
            f"begun[lazy]: TEXT {json.dumps(OPEN)}",
            f'call: {json.dumps(OPEN)} body {json.dumps(CLOSE)} "\\n"?',
            "TEXT: /(.|\\n)*/",
        ]
    lines.append("body: " + " | ".join(names))
    for name, tool in zip(names, tools, strict=True):
        function = tool["function"]
        head = json.dumps(f'\n{{"name": {json.dumps(function["name"])}, "arguments": ')
        schema = {**(function.get("parameters") or ANY_ARGUMENTS), "x-guidance": FORM}
        lines.append(f'{name}: {head} %json {json.dumps(schema)} "}}\\n"')
    return "\n".join(lines)


@final
class CallReader:
    """Separates the text of one answer into content and calls, as it comes."""

    def __init__(self) -> None:
        """Begin before the first token."""
        self._held = ""
        self.num_calls = 0

    def feed(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Content and whole calls that are certain now."""
        self._held += text
        content, calls = "", []
        while True:
            begin = self._held.find(OPEN)
            if begin < 0:
                keep = overlap(self._held, OPEN)
                content += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            content, self._held = content + self._held[:begin], self._held[begin:]
            end = self._held.find(CLOSE)
            if end < 0:
                break
            calls.append(self._call(self._held[len(OPEN) : end]))
            self._held = self._held[end + len(CLOSE) :].lstrip("\n")
        return content, calls

    def flush(self) -> str:
        """What was cut in the middle of a call is content."""
        rest, self._held = self._held, ""
        return rest

    def _call(self, text: str) -> dict[str, Any]:
        """A call in OpenAI's form; the grammar guarantees that it can be read."""
        call = json.loads(text)
        index, self.num_calls = self.num_calls, self.num_calls + 1
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        return {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
