"""What the commands of this room share: loading, and errors without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from trainer.errors import TrainerError, UserError
from trainer.inference.chat_model import ChatModel, Draw
from trainer.inference.source import find_source, other_source
from trainer.model.quiet import quiet_transformers


def draw_of(arguments: argparse.Namespace, num_samples: int = 1) -> Draw:
    """How answers are drawn.

    Args:
        arguments: of `chat` or `generate`.
        num_samples: answers per prompt.

    Raises:
        UserError: a number is out of range.
    """
    if arguments.max_tokens < 1 or num_samples < 1:
        raise UserError("--max-tokens and --samples must be 1 or more")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise UserError("--temperature must be 0 or more, and --top-p above 0 and at most 1")
    return Draw(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed, num_samples)


def load(arguments: argparse.Namespace) -> list[ChatModel]:
    """The model, and the one of `--against` if it was given.

    Raises:
        TrainerError: one cannot be loaded.
    """
    source = find_source(arguments.target, best=arguments.best, checkpoint=arguments.checkpoint)
    sources = [source] + ([other_source(arguments.against, source)] if arguments.against else [])
    return [ChatModel(each) for each in sources]


def run_command(
    parser: argparse.ArgumentParser, argv: list[str] | None, command: Callable[[argparse.Namespace], int]
) -> int:
    """Parse, run, and print errors for people without a traceback.

    Args:
        parser: of the command.
        argv: its arguments; those of the process when None.
        command: returns the exit code.
    """
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_transformers()
    try:
        return command(arguments)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
