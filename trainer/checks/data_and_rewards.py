"""`trainer check --data` and `--rewards`: rows as tokens, rewards tried on them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trainer.checks.data_survey import Selection, ShownRow, Survey, overlap, survey_rows
from trainer.checks.html_page import page
from trainer.config.arguments import add_recipe_arguments
from trainer.errors import EXIT_FINISHED, EXIT_USER, TrainerError, UserError
from trainer.planning.plan import Plan, RFTPlan
from trainer.run.plan_recipe import plan_recipe
from trainer.types import Row

UNTRAINED, TRAINED = ("\x1b[2m", "\x1b[2;4m"), ("\x1b[30;42m", "\x1b[30;102m")
"""Dim and black on green; every other token a shade apart, so that their borders are seen."""
RESET: Final = "\x1b[0m"
REFUSED_SHOWN: Final = 10
BAR_CHARS: Final = 40
PROBE_WORKERS: Final = 3
"""Reward processes that try texts at the same time, so that one which hangs leaves time for others."""


def main(argv: list[str] | None = None) -> int:
    """Show rows, try rewards; the exit code is 2 where training would be refused."""
    arguments = _parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    about: dict[str, Any] = {}
    try:
        plan = plan_recipe(Path(arguments.recipe), arguments.set, arguments.shape)
        is_refused = _show_data(plan, arguments, about) if arguments.data else False
        if arguments.rewards:
            is_refused |= _show_rewards(plan, arguments, about)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if arguments.json:
        sys.stdout.write(json.dumps(about, ensure_ascii=False) + "\n")
    return EXIT_USER if is_refused else EXIT_FINISHED


def _show_data(plan: Plan, arguments: argparse.Namespace, about: dict[str, Any]) -> bool:
    from trainer.data.chat import load_tokenizer

    if isinstance(plan, RFTPlan) and plan.recipe.rollout.environment is not None:
        about["data"] = "the environment writes the prompts"
        if not arguments.json:
            sys.stdout.write("the environment writes the prompts of these rows: `--rewards` plays it\n")
        return False
    tokenizer = load_tokenizer(plan.recipe.model)
    recipe, selection = plan.recipe, Selection(arguments.rows, tuple(arguments.row), arguments.find)
    train = survey_rows(recipe, recipe.data.train, tokenizer, selection=selection)
    surveys = {"training rows": train}
    if recipe.data.eval is not None:
        held_out = survey_rows(recipe, recipe.data.eval, tokenizer, selection=selection, limit=recipe.data.eval_rows)
        surveys["held-out rows"] = held_out
    if (selection.lines or selection.text is not None) and not any(survey.shown for survey in surveys.values()):
        sys.stderr.write("warning: no row that can be used is on these lines, or has this text\n")
    num_shared = overlap(recipe)
    is_refused = any(survey.refused for survey in surveys.values())
    about["data"] = {label: survey.describe() for label, survey in surveys.items()} | {"shared_rows": num_shared}
    _write_page(Path(arguments.html), page(recipe.name, surveys))
    if not arguments.json:
        is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        is_chosen = bool(selection.lines) or selection.text is not None
        shown = [row for survey in surveys.values() for row in survey.shown] if is_chosen else train.shown
        lines = [line for row in shown for line in row_lines(row, is_colored=is_colored)]
        lines += [line for label, survey in surveys.items() for line in survey_lines(label, survey)]
        lines += [f"page: {arguments.html}"]
        sys.stdout.write("\n".join(lines) + "\n")
    if num_shared:
        sys.stderr.write(f"warning: {num_shared:,} held-out rows are among the training rows too\n")
    for survey in surveys.values():
        _say_refused(survey)
    return is_refused


def _say_refused(survey: Survey) -> None:
    for reason in survey.refused[:REFUSED_SHOWN]:
        sys.stderr.write(f"{reason}\n")
    if len(survey.refused) > REFUSED_SHOWN:
        sys.stderr.write(f"and {len(survey.refused) - REFUSED_SHOWN:,} more rows of {survey.file} are refused\n")


def _write_page(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Name another file with --html.") from None


def _show_rewards(plan: Plan, arguments: argparse.Namespace, about: dict[str, Any]) -> bool:
    from trainer.data.sources import read_rows
    from trainer.rewards.dry_run import ProbeSettings, probe

    recipe = plan.recipe
    if recipe.method != "rft":
        raise UserError(f"{arguments.recipe}: has no rewards, since its method is {recipe.method}")
    lines: list[str] = []
    problems: Sequence[str] = ()
    rows = read_rows(recipe.data.train, recipe.data)
    if isinstance(plan, RFTPlan) and recipe.rollout.has_turns:
        lines += _play_environment(plan, rows)
    if recipe.reward_functions and recipe.rollout.environment is None:
        held_out = read_rows(recipe.data.eval, recipe.data, recipe.data.eval_rows) if recipe.data.eval else []
        limits = recipe.reward_limits
        settings = ProbeSettings(
            Path(plan.recipe_dir),
            timeout_s=limits.timeout_s,
            memory_limit_gib=limits.memory_limit_gib,
            column=recipe.reward_column,
            num_workers=max(limits.num_workers, PROBE_WORKERS),
            say=_say,
        )
        report = probe(recipe.reward_functions, rows, settings, held_out)
        lines += report.lines()
        problems = report.problems
    about["rewards"] = lines
    if not arguments.json:
        sys.stdout.write("\n".join(lines) + "\n")
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return bool(problems)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _play_environment(plan: RFTPlan, rows: Sequence[Row]) -> list[str]:
    from trainer.data.chat import ChatEncoder, load_tokenizer
    from trainer.data.forms import read_conversation
    from trainer.environments.pool import EnvironmentPool
    from trainer.environments.trial import play_trials
    from trainer.training.open_groups import environment_settings
    from trainer.training.tool_template import refuse_template_without_tools

    recipe = plan.recipe
    has_environment = recipe.rollout.environment is not None
    with EnvironmentPool(environment_settings(plan)) as pool:
        if pool.schemas:
            encoder = ChatEncoder(load_tokenizer(recipe.model), recipe.model, recipe.data, for_prompts=True)
            assert encoder.template is not None, "recipes with prompts have `format: chat`"
            refuse_template_without_tools(encoder.template, recipe.data.chat_template_kwargs)

        def messages(row: Row) -> Sequence[Mapping[str, Any]]:
            return () if has_environment else read_conversation(row, recipe.data, with_completion=False).messages

        return play_trials(pool, rows, messages, max_turns=recipe.rollout.max_turns, has_rewards=has_environment)


def row_lines(row: ShownRow, *, is_colored: bool) -> list[str]:
    """A row as text: trained tokens in colour, or in double brackets where there is none."""
    how = "on green" if is_colored else "in [[ ]]"
    head = f"{row.where}: {row.num_tokens:,} tokens, {row.num_trained:,} trained ({how}){row.note}"
    if is_colored:
        text = "".join(
            f"{(TRAINED if piece.is_trained else UNTRAINED)[number % 2]}{piece.text}{RESET}"
            for number, piece in enumerate(row.pieces)
        )
    else:
        text = ""
        is_inside = False
        for piece in row.pieces:
            text += "[[" if piece.is_trained and not is_inside else "]]" if is_inside and not piece.is_trained else ""
            text += piece.text
            is_inside = piece.is_trained
        text += "]]" if is_inside else ""
    return [head, *(f"  {line}" for line in text.split("\n")), ""]


def survey_lines(label: str, survey: Survey) -> list[str]:
    """Counts over all rows."""
    lines = [f"{label}: {survey.file}"]
    lines += [f"  {name:15} {value}" for name, value in survey.table()]
    width = max((len(name) for name, _ in survey.fields), default=0)
    lines += ["  fields:", *(f"    {name:{width}}  {use}" for name, use in survey.fields)] if survey.fields else []
    most = max((count for _, count in survey.histogram()), default=0)
    for name, count in survey.histogram():
        bar = "#" * round(BAR_CHARS * count / most)
        lines.append(f"  {name:>15} {count:>9,} {bar}".rstrip())
    return [*lines, ""]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer.checks.data_and_rewards", description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--data", action="store_true", help="show rows as tokens")
    parser.add_argument("--rewards", action="store_true", help="try the rewards")
    parser.add_argument("--html", default="preview.html", metavar="FILE", help="where --data writes its page")
    parser.add_argument("--rows", type=int, default=3, help="how many of the first rows to show")
    parser.add_argument(
        "--row", type=int, action="append", default=[], metavar="LINE", help="show the row of this line"
    )
    parser.add_argument("--find", metavar="TEXT", help="show rows with this text")
    parser.add_argument("--json", action="store_true", help="print counts as one JSON document")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
