"""`trainer chat`: talk to a model in the terminal, or to two models side by side."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Final, TextIO, final

from trainer.config.model_arguments import add_chat_arguments
from trainer.errors import DataError
from trainer.inference.chat_model import ChatModel, Draw
from trainer.inference.command_line import draw_of, load, run_command
from trainer.inference.server_model import ServerModel, is_address

HELP: Final = "/reset begins a new chat, /quit or Ctrl-D ends"
NARROW: Final = 60
"""Columns below which two answers stand one below the other."""
CUT: Final = " ... (cut at --max-tokens)"


@final
class Chat:
    """A chat with one or several models; each goes on from its own answers."""

    def __init__(self, models: Sequence[ChatModel | ServerModel], draw: Draw, system: str | None) -> None:
        """Begin a chat.

        Args:
            models: at least one.
            draw: how answers are drawn.
            system: a system message; None takes that of the run's recipe, if it has one.
        """
        self.models, self.draw, self.system = models, draw, system
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.histories: list[list[dict[str, Any]]] = [list(first) for _ in self.models]

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> list[str]:
        """Add a user turn; returns the answer of each model.

        Args:
            text: of the turn.
            on_text: takes the pieces of the first model's answer as they come.

        Raises:
            DataError: the text cannot be a turn; the chat is as before.
        """
        replies = []
        for model, history in zip(self.models, self.histories, strict=True):
            heard = on_text if model is self.models[0] else None
            replies.append(model.reply([*history, {"role": "user", "content": text}], self.draw, heard))
        for history, reply in zip(self.histories, replies, strict=True):
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        return [reply.text + (CUT if reply.finish_reason == "length" else "") for reply in replies]


def talk(chat: Chat, lines: Iterator[str], out: TextIO, width: int) -> None:
    """Answer lines until they end.

    Args:
        chat: with its models.
        lines: what the user types.
        out: where answers go.
        width: of the terminal, in columns.
    """
    labels = [model.source.label for model in chat.models]
    for line in lines:
        text = line.strip()
        if text in {"/quit", "/exit"}:
            return
        if text == "/reset":
            chat.reset()
            out.write("(a new chat)\n")
        elif text.startswith("/"):
            out.write(f"({HELP})\n")
        elif text:
            try:
                _answer(chat, text, labels, out, width)
            except DataError as error:
                out.write(f"({str(error).removeprefix('chat:1: ')})\n")
        out.flush()


def _answer(chat: Chat, text: str, labels: Sequence[str], out: TextIO, width: int) -> None:
    """One model's answer as its tokens come; those of several side by side."""
    if len(labels) > 1:
        out.write("\n".join(answer_lines(labels, chat.say(text), width)) + "\n\n")
        return

    def show(piece: str) -> None:
        out.write(_shown(piece))
        out.flush()

    (answer,) = chat.say(text, show)
    out.write(f"{CUT if answer.endswith(CUT) else ''}\n\n")


def answer_lines(labels: Sequence[str], answers: Sequence[str], width: int) -> list[str]:
    """Answers side by side; one below the other where the terminal is narrow.

    >>> answer_lines(["sums", "base"], ["4", "It is five, I think"], 62)
    ['sums                            base', '4                               It is five, I think']

    Args:
        labels: of the models.
        answers: of each model.
        width: of the terminal, in columns.
    """
    if width < NARROW:
        return [
            line for label, text in zip(labels, answers, strict=True) for line in [f"{label}:", *_wrapped(text, width)]
        ]
    column = width // len(answers) - 1
    columns = [[label[:column], *_wrapped(text, column - 2)] for label, text in zip(labels, answers, strict=True)]
    rows = zip_longest(*columns, fillvalue="")
    return [" ".join(cell.ljust(column) for cell in row).rstrip() for row in rows]


def _shown(text: str) -> str:
    """The text without control characters: a model may write terminal escapes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in _shown(text).split("\n") for part in textwrap.wrap(line, max(1, width)) or [""]]


def main(argv: list[str] | None = None) -> int:
    """Chat until the input ends."""
    parser = argparse.ArgumentParser(prog="trainer chat", description=__doc__)
    add_chat_arguments(parser)
    return run_command(parser, argv, _chat)


def _chat(arguments: argparse.Namespace) -> int:
    models: Sequence[ChatModel | ServerModel]
    if is_address(arguments.target):
        models = [ServerModel(each) for each in (arguments.target, arguments.against) if each]
    else:
        models = load(arguments)
    chat = Chat(models, draw_of(arguments), arguments.system)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        sys.stderr.write(f"{' | '.join(model.source.label for model in chat.models)}: {HELP}\n")
    talk(chat, _typed() if is_terminal else sys.stdin, sys.stdout, shutil.get_terminal_size().columns)
    return 0


def _typed() -> Iterator[str]:
    """Lines from the terminal, which readline lets the user edit."""
    import readline  # noqa: F401  -- its import changes input()

    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return


if __name__ == "__main__":
    sys.exit(main())
