"""Refuses rows of which the chat template leaves something out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from trainer.data.forms import Conversation
from trainer.data.template import ChatTemplate
from trainer.errors import DataError
from trainer.types import Row

READ_ELSEWHERE: Final = ("role", "content", "weight", "tool_calls")
IDENTIFIERS: Final = ("id", "tool_call_id", "call_id", "uuid", "message_id", "parent_id", "index", "idx")
METADATA: Final = (
    *IDENTIFIERS,
    *("timestamp", "created_at", "created", "date", "model", "source", "language", "lang", "tokens", "num_tokens"),
    *("score", "rating", "metadata", "annotations", "finish_reason", "stop_reason", "turn"),
)
"""Fields of messages that say something about them and are no text for the model."""
SENTINEL: Final = "zq"
"""Letters and digits that templates neither trim nor escape."""


@final
class LostText:
    """Checks by rendering: a field that is changed, or left out, must change the text."""

    def __init__(self, template: ChatTemplate) -> None:
        """Keep the template."""
        self._template = template
        self._complete: set[Any] = set()
        """Structures of chats of which every content and tool reaches the text."""

    def refuse(self, row: Row, chat: Conversation, text: str, *, is_prompt: bool) -> None:
        """Refuse a row whose contents, fields, tools or calls do not reach the text.

        Args:
            row: for messages to people.
            chat: the row.
            text: all of it, rendered.
            is_prompt: whether the text ends with a generation prompt.

        Raises:
            DataError: names the message, the field and the remedy.
        """
        structure = (tuple(_structure(message) for message in chat.messages), _tool_parts(chat.tools), is_prompt)
        if structure not in self._complete:
            self._refuse_contents(row, chat, is_prompt=is_prompt)
            self._refuse_tools(row, chat, is_prompt=is_prompt)
            self._complete.add(structure)
        for index, message in enumerate(chat.messages):
            content = message["content"].strip()
            if message["role"] != "assistant" and content not in text and _squashed(content) not in _squashed(text):
                self._refuse_content(row, chat, index, is_prompt=is_prompt)
            if message.get("tool_calls"):
                self._refuse_calls(row, chat, index)
            for name, value in message.items():
                if name not in READ_ELSEWHERE and not _is_plumbing(message, name) and not _is_empty(value):
                    self._refuse_field(row, chat, index, name)

    def _text(
        self, chat: Conversation, messages: list[Any], tools: Any = None, *, is_prompt: bool = False
    ) -> str | None:
        """The text of a variant of the row; None where the template does not take it."""
        render = self._template.prompt if is_prompt else self._chat_text
        try:
            return render(messages, tools or chat.tools, chat.template_arguments)
        except Exception:  # a template raises whatever its author thought of
            return None

    def _chat_text(self, messages: Any, tools: Any, arguments: Mapping[str, Any]) -> str:
        return self._template.chat(messages, tools, arguments).text

    def _refuse_contents(self, row: Row, chat: Conversation, *, is_prompt: bool) -> None:
        """Refuse where contents of other words than the row's do not all reach the text."""
        words = [
            f"{SENTINEL}{index}content" if message["content"].strip() else ""
            for index, message in enumerate(chat.messages)
        ]
        messages = [{**message, "content": word} for message, word in zip(chat.messages, words, strict=True)]
        text = self._text(chat, messages, is_prompt=is_prompt)
        if text is None:
            return
        for index, word in enumerate(words):
            if word not in text:
                raise DataError(self._content_text(row, chat, index))

    def _refuse_content(self, row: Row, chat: Conversation, index: int, *, is_prompt: bool) -> None:
        """Refuse where another content at this place would not change the text."""
        word = f"{SENTINEL}{index}content"
        messages = [*chat.messages]
        messages[index] = {**messages[index], "content": word}
        text = self._text(chat, messages, is_prompt=is_prompt)
        if text is not None and word not in text:
            raise DataError(self._content_text(row, chat, index))

    def _content_text(self, row: Row, chat: Conversation, index: int) -> str:
        role = chat.messages[index]["role"]
        return (
            f"{row}: messages[{index}]: the chat template leaves out the content of this turn by {role}. Move the text "
            "into a turn that the template renders, or set another `model.chat_template`."
        )

    def _refuse_tools(self, row: Row, chat: Conversation, *, is_prompt: bool) -> None:
        for index, tool in enumerate(chat.tools or []):
            assert chat.tools is not None
            changed, words = _marked_tool(tool)
            tools = [*chat.tools[:index], changed, *chat.tools[index + 1 :]]
            text = self._text(chat, chat.messages, tools, is_prompt=is_prompt)
            for what, word in words.items() if text is not None else ():
                if text is not None and word not in text:
                    raise DataError(
                        f"{row}: the chat template leaves out the tool {tool['function']['name']!r} "
                        f"(`tools[{index}].{what}`). Remove the row, or set a `model.chat_template` that renders tools."
                    )

    def _refuse_calls(self, row: Row, chat: Conversation, index: int) -> None:
        message = chat.messages[index]
        for place, call in enumerate(message["tool_calls"]):
            function = call["function"]
            arguments = {**function["arguments"], f"{SENTINEL}key": f"{SENTINEL}value"}
            changed = {**call, "function": {**function, "name": f"{SENTINEL}call", "arguments": arguments}}
            calls = [*message["tool_calls"][:place], changed, *message["tool_calls"][place + 1 :]]
            messages = [*chat.messages[:index], {**message, "tool_calls": calls}]
            text = self._text(chat, messages)
            for word in (f"{SENTINEL}call", f"{SENTINEL}key", f"{SENTINEL}value") if text is not None else ():
                if text is not None and word not in text:
                    raise DataError(
                        f"{row}: the chat template leaves out the tool {function['name']!r} "
                        f"(`messages[{index}].tool_calls`). Remove the row, or set a `model.chat_template` that "
                        "renders tool calls."
                    )

    def _refuse_field(self, row: Row, chat: Conversation, index: int, name: str) -> None:
        message = chat.messages[index]
        rest = {key: value for key, value in message.items() if key != name}
        with_it = self._text(chat, chat.messages[: index + 1])
        without = self._text(chat, [*chat.messages[:index], rest])
        if with_it is None:  # the template takes no chat that ends here
            later = chat.messages[index + 1 :]
            with_it = self._text(chat, chat.messages)
            without = self._text(chat, [*chat.messages[:index], rest, *later])
        if with_it is not None and with_it == without:
            raise DataError(
                f"{row}: messages[{index}]: the chat template does not render `{name}`, so it would be lost. Write it "
                f"into `content`, set another `model.chat_template`, or set data.ignore to [{name}]."
            )


def _structure(message: Mapping[str, Any]) -> tuple[Any, ...]:
    return (message["role"], bool(message["content"].strip()), tuple(sorted(message)))


def _tool_parts(tools: list[dict[str, Any]] | None) -> tuple[Any, ...]:
    return tuple(tuple(_marked_tool(tool)[1]) for tool in tools or [])


def _marked_tool(tool: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tool with other words in it, and which word stands in which of its parts."""
    function = dict(tool["function"])
    words = {"function.name": f"{SENTINEL}tool"}
    function["name"] = words["function.name"]
    if isinstance(function.get("description"), str) and function["description"]:
        function["description"] = words["function.description"] = f"{SENTINEL}description"
    parameters = function.get("parameters")
    if isinstance(parameters, Mapping) and parameters.get("properties"):
        words["function.parameters"] = f"{SENTINEL}parameter"
        added = {words["function.parameters"]: {"type": "string", "description": "a text"}}
        function["parameters"] = {**parameters, "properties": {**parameters["properties"], **added}}
    return {**tool, "function": function}, words


def _is_plumbing(message: Mapping[str, Any], name: str) -> bool:
    return name in METADATA or (name == "name" and message["role"] == "tool")


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | Mapping) and not value)


def _squashed(text: str) -> str:
    return "".join(text.split())
