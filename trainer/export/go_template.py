"""Derives an Ollama template (Go text/template) from a Jinja chat template, by rendering probes.

The template must decompose: a beginning with or without a system message, then one fixed text before and one after each
message, then the beginning of the answer. Whether it does is decided by rendering chats both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, TypeAlias, final

from trainer.errors import ModelError

Chat: TypeAlias = Sequence[Mapping[str, str]]
Render: TypeAlias = Callable[[Chat, bool], str]
"""A chat by its Jinja template; with True followed by the beginning of the answer."""
REMEDY: Final = "Use the chat template in the GGUF file (llama.cpp does), or set `model.chat_template` and train again."


@final
@dataclass(frozen=True)
class ChatFormat:
    """The fixed texts of a chat template; those of ChatML in the examples."""

    beginning: str
    """Of a chat without a system message."""
    system: tuple[str, str] | None
    """Before and after a system message: `<|im_start|>system\\n` and `<|im_end|>\\n`. None where it takes none."""
    user: tuple[str, str]
    """`<|im_start|>user\\n` and `<|im_end|>\\n`."""
    assistant: tuple[str, str]
    answer: str
    """Before the answer: `<|im_start|>assistant\\n`."""

    def render(self, chat: Chat) -> str:
        """The prompt after a chat, as `go_template` renders it."""
        has_system = chat[0]["role"] == "system"
        parts = [self.beginning]
        if has_system and self.system is not None:
            parts = [self.system[0], chat[0]["content"], self.system[1]]
        for message in chat[has_system:]:
            before, after = self.user if message["role"] == "user" else self.assistant
            parts += [before, message["content"], after]
        return "".join([*parts, self.answer])

    def go_template(self) -> str:
        """The same as a template of Ollama: for chats that end with the user, and for answers to be continued."""
        beginning = _literal(self.beginning)
        if self.system is not None:
            before, after = map(_literal, self.system)
            beginning = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{beginning}{{{{ end }}}}"
        user, assistant = tuple(map(_literal, self.user)), tuple(map(_literal, self.assistant))
        return (
            beginning
            + "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + f'{{{{ if eq $m.Role "user" }}}}{user[0]}{{{{ $m.Content }}}}{user[1]}'
            + f"{{{{ if $last }}}}{_literal(self.answer)}{{{{ end }}}}"
            + f'{{{{ else if eq $m.Role "assistant" }}}}{assistant[0]}{{{{ $m.Content }}}}'
            + f"{{{{ if not $last }}}}{assistant[1]}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def derive_format(render: Render) -> ChatFormat:
    """Find the fixed texts of a chat template, and compare both on varied chats.

    Args:
        render: a chat by its Jinja template; raises where the template refuses one.

    Raises:
        ModelError: the template does not decompose; shows the first chat that is rendered otherwise.
    """
    chat_format = _probe(render)
    for chat in varied_chats(with_system=chat_format.system is not None):
        if chat_format.render(chat) != render(chat, True):
            raise ModelError(
                "the chat template is not a fixed text around each message, so it has no equal in Ollama's language: "
                f"it renders a chat of {len(chat)} messages otherwise. {REMEDY}"
            )
    return chat_format


def _probe(render: Render) -> ChatFormat:
    one = _split(render, [("user", "zqua")])
    three = _split(render, [("user", "zqua"), ("assistant", "zqub"), ("user", "zquc")])
    try:
        with_system = _split(render, [("system", "zqus"), ("user", "zqua")])
    except ModelError:
        with_system = None
    # What follows a user's message begins the same before an answer to be written and before a written one.
    after_user = _common_prefix([one[1], three[1]])
    before_user = _common_suffix([one[0], three[2], *([with_system[1]] if with_system is not None else [])])
    end = render([{"role": "user", "content": "zqua"}], False).rpartition("zqua")[2]
    if after_user.startswith(end):  # put the end of a turn behind it, rather than before the next
        after_user, before_user = end, before_user.removeprefix(end)
    return ChatFormat(
        beginning=one[0].removesuffix(before_user),
        system=None if with_system is None else (with_system[0], with_system[1].removesuffix(before_user)),
        user=(before_user, after_user),
        assistant=(three[1].removeprefix(after_user), three[2].removesuffix(before_user)),
        answer=one[1].removeprefix(after_user),
    )


def _split(render: Render, messages: Sequence[tuple[str, str]]) -> list[str]:
    """The text around each message.

    Raises:
        ModelError: the template refuses the chat, or does not show each message once.
    """
    roles = [role for role, _ in messages]
    try:
        rest = render([{"role": role, "content": content} for role, content in messages], True)
    except Exception as error:  # a template raises whatever its author thought of
        raise ModelError(f"the chat template refuses a chat of {', '.join(roles)}: {error}. {REMEDY}") from None
    parts = []
    for role, content in messages:
        if rest.count(content) != 1:
            raise ModelError(f"the chat template does not show a message of {role} as it is. {REMEDY}")
        before, rest = rest.split(content)
        parts.append(before)
    return [*parts, rest]


def _common_prefix(texts: Sequence[str]) -> str:
    columns = zip(*texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _common_suffix(texts: Sequence[str]) -> str:
    return _common_prefix([text[::-1] for text in texts])[::-1]


def default_system(chat_format: ChatFormat) -> str | None:
    """The system message that the template itself puts into a chat without one; None where there is none."""
    if chat_format.system is None:
        return None
    before, after = chat_format.system
    beginning = chat_format.beginning
    is_framed = beginning.startswith(before) and beginning.endswith(after)
    return beginning[len(before) : len(beginning) - len(after)] or None if is_framed else None


def varied_chats(*, with_system: bool) -> Iterator[list[dict[str, str]]]:
    """Twenty chats: one to seven messages, with and without a system message, with text of many kinds.

    Args:
        with_system: whether some have a system message.
    """
    texts = (
        "What is 2 + 2?", "Grüße, 你好 🦊", 'A "quoted" word, {{ braces }} and {% tags %}', "two\nlines\n\nand a gap",
        "def f(x):\n    return x  # code", "<b>markup</b> & entities", "100%", "a" * 200,
    )  # fmt: skip
    for number in range(20):
        chat = [
            {"role": ("user", "assistant")[turn % 2], "content": texts[(3 * number + 5 * turn) % len(texts)]}
            for turn in range(2 * (number % 4) + 1)
        ]
        if with_system and number % 2:
            chat.insert(0, {"role": "system", "content": texts[number % len(texts)]})
        yield chat


def _literal(text: str) -> str:
    """Text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
