"""What `trainer check` finds by reading the first rows, the model's files and the targets, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import BUILTIN_TEMPLATES, DataSource, Recipe, RFTRecipe
from trainer.config.source_files import source_files
from trainer.data.forms import read_conversation, read_plain_text
from trainer.data.sources import read_rows
from trainer.errors import DataError, RewardError
from trainer.planning.module_names import module_names, target_problems
from trainer.rewards.row_checks import refuse_unscorable_rows
from trainer.types import Row

NUM_ROWS: Final = 20
"""Rows of each source that are looked at."""
MAX_SHOWN: Final = 5


def find_problems(recipe: Recipe, recipe_dir: Path) -> list[str]:
    """Return what the run would refuse, as far as first rows and file headers tell.

    Args:
        recipe: A valid recipe.
        recipe_dir: Directory of the recipe file.
    """
    return [*_targets(recipe), *_template(recipe), *_positions(recipe), *_rows(recipe)]


def _rows(recipe: Recipe) -> Iterator[str]:
    for source in filter(None, (recipe.data.train, recipe.data.eval)):
        if not _is_local(source):
            continue
        refused: list[DataError] = []
        try:
            rows = read_rows(source, recipe.data, NUM_ROWS, refused)
        except DataError as error:
            yield str(error)
            continue
        problems = [str(error) for error in refused]
        problems += [problem for row in rows if (problem := _row_problem(row, recipe)) is not None]
        if isinstance(recipe, RFTRecipe) and not problems:
            try:
                refuse_unscorable_rows(recipe.rewards, rows)
            except RewardError as error:
                problems += str(error).splitlines()
        yield from problems[:MAX_SHOWN]
        if len(problems) > MAX_SHOWN:
            yield f"and {len(problems) - MAX_SHOWN} more among the first {len(rows)} rows: see `trainer check --data`"


def _row_problem(row: Row, recipe: Recipe) -> str | None:
    try:
        if recipe.data.format == "text" and not isinstance(recipe, RFTRecipe):
            read_plain_text(row, recipe.data)
        else:
            read_conversation(row, recipe.data, with_completion=not isinstance(recipe, RFTRecipe))
    except DataError as error:
        return str(error)
    return None


def _is_local(source: DataSource) -> bool:
    sources = source.sources or [source]
    return all(source_files(each) for each in sources)


def _targets(recipe: Recipe) -> Iterator[str]:
    if recipe.lora is None or recipe.lora.target_modules == "all-linear":
        return
    modules = module_names(recipe.model.path)
    if modules is not None:
        for problem in target_problems(recipe.lora.target_modules, modules):
            yield f"lora.target_modules: {problem}"


def _template(recipe: Recipe) -> Iterator[str]:
    """A missing chat template, where the model's tokenizer files are here."""
    directory = Path(recipe.model.path)
    if recipe.data.format == "text" or recipe.model.chat_template is not None:
        return
    settings = _read_json(directory / "tokenizer_config.json")
    if settings is None:
        return
    if not settings.get("chat_template") and not any(directory.glob("chat_template*")):
        yield (
            f"{directory}: the tokenizer has no chat template. Set `model.chat_template` to a Jinja file or to a "
            f"built-in template ({', '.join(BUILTIN_TEMPLATES)}), or train with `data.format: text`."
        )


def _positions(recipe: Recipe) -> Iterator[str]:
    config = _read_json(Path(recipe.model.path) / "config.json")
    if config is None:
        return
    inner = config.get("text_config")
    limit = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    if isinstance(limit, int) and recipe.data.max_seq_tokens > limit:
        yield (
            f"data.max_seq_tokens: {recipe.data.max_seq_tokens:,} tokens, but the model has {limit:,} positions "
            "(max_position_embeddings in its config.json)"
        )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
