"""Whether a chat template can show tools, calls and results, by a trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trainer.config.unsupported import NO_TOOLS, TOOLS_REMEDY
from trainer.data.template import ChatTemplate
from trainer.environments.tool_calls import parse_turn
from trainer.errors import ModelError

NAME: Final = "zqtool"
RESULT: Final = "zqresult"
SCHEMA: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "A trial.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
USER: Final = {"role": "user", "content": "zquestion"}
CALL: Final[dict[str, Any]] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call_0", "function": {"name": NAME, "arguments": {"a": 7}}}],
}
ANSWER: Final = {"role": "tool", "tool_call_id": "call_0", "name": NAME, "content": RESULT}


def refuse_template_without_tools(template: ChatTemplate, arguments: Mapping[str, Any]) -> None:
    """Render a tool, a call and a result, and read the call back.

    Args:
        template: of the model.
        arguments: further variables of the template.

    Raises:
        ModelError: one of them is not shown, or calls have another form than the one that is read.
    """
    try:
        prompt = template.prompt([USER], [SCHEMA], arguments)
        later = template.prompt([USER, CALL, ANSWER], [SCHEMA], arguments)
    except Exception as error:  # a template raises whatever its author thought of
        raise ModelError(f"the chat template refuses tools: {error}. {TOOLS_REMEDY}") from None
    if NAME not in prompt:
        raise ModelError(NO_TOOLS)
    if RESULT not in later:
        raise ModelError(f"the chat template leaves out the results of tools. {TOOLS_REMEDY}")
    written = later[later.find(USER["content"]) :].partition(RESULT)[0]
    calls = parse_turn(written).calls
    if not any(call.status == "ok" and call.name == NAME and call.arguments == {"a": 7} for call in calls):
        raise ModelError(
            f"the chat template writes tool calls in another form than <tool_call>{{...}}</tool_call>. {TOOLS_REMEDY}"
        )
