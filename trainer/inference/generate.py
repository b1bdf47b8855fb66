"""`trainer generate`: a model's answers to a file of prompts, as rows that can be trained on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, TextIO

from trainer.config.model_arguments import add_generate_arguments
from trainer.config.recipe import DataSource
from trainer.data.forms import row_messages
from trainer.data.sources import read_rows
from trainer.errors import DataError, UserError
from trainer.inference.chat_model import ChatModel, Draw, prompt_row
from trainer.inference.command_line import draw_of, run_command
from trainer.inference.source import find_source
from trainer.inference.text_stream import TextStream
from trainer.types import Row

CHUNK: Final = 16
"""Prompts that are answered together."""


def answers(model: ChatModel, rows: list[Row], draw: Draw) -> Iterator[dict[str, Any]]:
    """Yield a row for each answer: its prompt, and the answer as its completion.

    Args:
        model: answers.
        rows: prompts; a chat that ends with an answer loses it.
        draw: how.

    Raises:
        DataError: a row is no prompt.
    """
    prompts = [prompt_row(row, model.source) for row in rows]
    for prompt in prompts:  # a mistake in the last row is said before time is spent
        model.prompt_ids(prompt)
    for begin in range(0, len(prompts), CHUNK):
        chunk = prompts[begin : begin + CHUNK]
        for prompt, completions in zip(chunk, model.answer(chunk, draw), strict=True):
            messages = row_messages(prompt, model.source.data, with_completion=False)
            for sample, completion in enumerate(completions):
                yield {
                    "prompt": messages,
                    "completion": completion.text,
                    "source": str(prompt),
                    "sample": sample,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": len(completion.token_ids),
                }


def write_texts(model: ChatModel, rows: list[Row], draw: Draw, out: TextIO) -> None:
    """Write each answer as its tokens come, with a blank line between two.

    Args:
        model: answers.
        rows: prompts.
        draw: how; one answer per prompt.
        out: where to.

    Raises:
        DataError: a row is no prompt.
    """
    prompts = [prompt_row(row, model.source) for row in rows]
    for prompt in prompts:
        model.prompt_ids(prompt)

    def show(piece: str) -> None:
        out.write(piece)
        out.flush()

    for prompt in prompts:
        stream = TextStream(model.tokenizer, show)
        ((completion,),) = model.answer([prompt], draw, stream.take)
        stream.finish(completion.text)
        show("\n\n")


def main(argv: list[str] | None = None) -> int:
    """Answer the prompts of a file."""
    parser = argparse.ArgumentParser(prog="trainer generate", description=__doc__)
    add_generate_arguments(parser)
    return run_command(parser, argv, _generate)


def _generate(arguments: argparse.Namespace) -> int:
    draw = draw_of(arguments, arguments.samples)
    source = find_source(arguments.target, best=arguments.best, checkpoint=arguments.checkpoint)
    if draw.num_samples > 1 and draw.temperature == 0:
        raise UserError("--samples needs a --temperature above 0: without noise all answers are equal")
    if draw.num_samples > 1 and arguments.text:
        raise UserError("--text writes one answer per prompt; leave out --samples")
    if arguments.prompts == "-" or arguments.prompts.endswith(".txt"):
        rows = _text_rows(arguments.prompts)
    else:
        rows = read_rows(DataSource(path=arguments.prompts), source.data)
    model = ChatModel(source)
    try:
        target = Path(arguments.out).open("w", encoding="utf-8") if arguments.out else nullcontext(sys.stdout)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{arguments.out}: {error.strerror}. Name another file with --out.") from None
    with target as out:
        if arguments.text:
            write_texts(model, rows, draw, out)
            return 0
        for answer in answers(model, rows, draw):
            out.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")
            out.flush()
    return 0


def _text_rows(name: str) -> list[Row]:
    """A prompt a line; empty lines are left out."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from None
    file = "standard input" if name == "-" else name
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: holds no prompts. Give a prompt a line.")
    return [Row({"prompt": line}, file, number, index) for index, (number, line) in enumerate(lines)]


if __name__ == "__main__":
    sys.exit(main())
