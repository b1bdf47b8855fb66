"""`trainer init`: five questions, or flags, and a commented recipe; `--quickstart` writes the shipped one."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from trainer.commands.first_look import find_problems
from trainer.config.load import all_shapes, find_shape
from trainer.config.reward_place import BUILT_IN
from trainer.errors import EXIT_USER, DataError, RecipeError, ShapeError, TrainerError, UserError
from trainer.files import write_atomically
from trainer.run.console import tell
from trainer.run.plan_recipe import plan_recipe
from trainer.starter.data_file import DataFile, look_at
from trainer.starter.first_recipe import (
    TRAIN_ON,
    Answers,
    default_model,
    default_reward,
    name_of,
    recipe_text,
)
from trainer.starter.shipped import MODEL, write_quickstart, write_schema

METHODS: Final = ("sft", "rft")
NO_PREFERENCES: Final = "preferences (DPO, ORPO, KTO, PPO with a reward model) are not trained here"
MAX_SHOWN: Final = 5
T = TypeVar("T")
Ask = Callable[[str, str], str]
"""From a question and the default to the answer."""


def init(arguments: argparse.Namespace) -> int:
    """Write a recipe for the user's rows, and say what comes next; the exit code is that of `trainer check`."""
    if arguments.quickstart:
        return _quickstart()
    ask = _asker(arguments)
    answers = _answers(arguments, ask)
    out = Path(arguments.out or f"{answers.name}.yaml")
    if out.exists() and not arguments.force:
        raise UserError(f"{out} exists. Name another file with --out, or replace it with --force.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, recipe_text(answers))
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}. Name another file with --out.") from None
    write_schema(out.parent)
    tell(f"{out}: written")
    problems = list(dict.fromkeys([*answers.data.refused, *_problems(out)]))
    for problem in problems[:MAX_SHOWN]:
        tell(problem)
    if len(problems) > MAX_SHOWN:
        tell(f"and {len(problems) - MAX_SHOWN} more: trainer check {out} --data")
    _say_next(out, answers, is_ready=not problems)
    return EXIT_USER if problems else 0


def _quickstart() -> int:
    for line in write_quickstart(Path()):
        tell(line)
    argv = [sys.executable, "-m", "trainer.starter.prepare_model"]
    code = subprocess.run(argv, check=False).returncode if not (Path(MODEL) / "config.json").is_file() else 0
    if code == 0:
        _print("trainer train recipes/sft_quickstart.yaml    # JSON from sentences; minutes on two CPU cores")
        _print("trainer train recipes/rft_quickstart.yaml    # sums, by GRPO")
    return code


def _asker(arguments: argparse.Namespace) -> Ask | None:
    """How questions are asked; None where nobody is there to answer, or `--yes` takes the defaults."""
    if arguments.yes or not sys.stdin.isatty():
        return None

    def ask(question: str, default: str) -> str:
        sys.stderr.write(f"{question}\n")
        sys.stderr.flush()
        try:
            return input(f"  [{default}] > " if default else "  > ").strip() or default
        except EOFError:
            raise UserError("the questions were not answered; nothing was written") from None

    return ask


def _answers(arguments: argparse.Namespace, ask: Ask | None) -> Answers:
    """The answers, from flags, questions and defaults, each looked at before the next one is asked.

    Raises:
        UserError: an answer cannot be used, and there is nobody to ask again.
    """
    method = _asked(
        ask,
        arguments.method,
        "1/5 Method: sft learns the answers in your rows; rft tries answers and learns from rewards.",
        "sft",
        _method,
    )
    model = _asked(
        ask,
        arguments.model,
        "2/5 Model: a directory with config.json and safetensors, or a hub name (owner/name).",
        default_model(),
        _model,
    )
    data = _asked(
        ask,
        arguments.data,
        "3/5 Rows: a file or directory (.jsonl, .json, .csv, .parquet) of chats, ShareGPT, alpaca or prompts.",
        "",
        lambda path: _rows(path, is_rft=method == "rft"),
    )
    tell(f"  {data.path}: {data.num_rows} rows, read as {data.form}")
    optimize = _asked(ask, arguments.optimize, *_goal(method, data))
    shape = _asked(
        ask,
        arguments.shape,
        "5/5 Where: auto (the GPUs of this machine, else its CPU), or a shape such as "
        f"{', '.join(shape.name for shape in all_shapes()[:3])} (all: trainer shapes).",
        "auto",
        _shape,
    )
    name = arguments.name or name_of(data.path)
    return Answers(name, "rft" if method == "rft" else "sft", model, data, optimize, shape)


def _goal(method: str, data: DataFile) -> tuple[str, str, Callable[[str], str]]:
    """The question what is optimized, its default, and how an answer is read."""
    if method == "sft":
        return (
            "4/5 Optimize: all (every assistant turn) or last (only the last turn of each row).",
            "all",
            lambda text: _one_of(text, TRAIN_ON, "--optimize"),
        )
    return (
        f"4/5 Reward: one of {', '.join(BUILT_IN)}, or FILE.py:FUNCTION with (completion, row) -> float.",
        default_reward(data.first),
        str,
    )


def _asked(ask: Ask | None, given: str | None, question: str, default: str, read: Callable[[str], T]) -> T:
    """One answer: the flag's, the user's, or the default; a wrong answer is asked again."""
    if given is not None or ask is None:
        value = given if given is not None else default
        if not value:
            raise UserError("name the rows with --data FILE: without a terminal no questions are asked")
        return read(value)
    while True:
        try:
            return read(ask(question, default))
        except TrainerError as error:
            tell(f"  {error}")


def _method(text: str) -> str:
    if text.lower() in {"dpo", "ppo", "orpo", "kto", "simpo", "reward", "rm"}:
        raise UserError(
            f"{text}: {NO_PREFERENCES}. sft trains the better answers; rft trains on rewards that you write."
        )
    return _one_of(text.lower(), METHODS, "--method")


def _one_of(text: str, allowed: tuple[str, ...], flag: str) -> str:
    if text not in allowed:
        raise UserError(f"{flag} must be {' or '.join(allowed)} (got {text!r:.60})")
    return text


def _model(text: str) -> str:
    path = Path(text).expanduser()
    is_hub = text.count("/") == 1 and not path.exists() and not text.startswith((".", "/", "~", "models/"))
    if is_hub or (path / "config.json").is_file():
        return text if is_hub else str(path)
    if text == MODEL:
        raise UserError(f"{text} does not exist yet: `trainer init --quickstart` makes it, or name another --model")
    raise UserError(f"{text}: no config.json there. Name a model's directory, or a hub name (owner/name).")


def _rows(text: str, *, is_rft: bool) -> DataFile:
    if not text:
        raise DataError("name a file")
    return look_at(str(Path(text).expanduser()), is_rft=is_rft)


def _shape(text: str) -> str:
    if text != "auto":
        try:
            find_shape(text)
        except (ShapeError, RecipeError) as error:
            raise UserError(str(error)) from None
    return text


def _problems(recipe: Path) -> Iterator[str]:
    """What `trainer check` would refuse; says warnings."""
    try:
        plan = plan_recipe(recipe, [])
    except UserError as error:
        yield str(error)
        return
    for warning in plan.warnings:
        tell(f"warning: {warning}")
    yield from find_problems(plan.recipe, Path(plan.recipe_dir))


def _say_next(recipe: Path, answers: Answers, *, is_ready: bool) -> None:
    if not is_ready:
        _print(f"trainer check {recipe}    # again, after the problems above are fixed")
        return
    flag, what = ("--data", "which tokens are trained") if answers.method == "sft" else ("--rewards", "try the reward")
    _print(f"trainer check {recipe} {flag}    # {what}")
    _print(f"trainer train {recipe}")
    _print(f"trainer chat {answers.name} --against base    # when it is trained")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
