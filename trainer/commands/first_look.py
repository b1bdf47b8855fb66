"""What `trainer check` finds by reading the first rows, the model's files and the targets, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import BUILTIN_TEMPLATES, DataSource, Recipe, RFTRecipe
from trainer.config.shape import TrainingShape
from trainer.config.source_files import source_files
from trainer.config.unsupported import NO_TOOLS
from trainer.data.forms import read_conversation, read_plain_text
from trainer.data.sources import read_rows
from trainer.errors import DataError, LaunchError, RewardError
from trainer.planning.module_names import module_names, target_problems
from trainer.rewards.row_checks import refuse_unscorable_rows
from trainer.types import Row

TEMPLATES: Final = Path(__file__).resolve().parents[1] / "data/templates"
"""Built-in chat templates."""
NUM_ROWS: Final = 20
"""Rows of each source that are looked at."""
MAX_SHOWN: Final = 5
USED_SETTINGS: Final = ("chat_template", "eos_token", "bos_token")
"""Of tokenizer_config.json, which may list every other token too."""


def find_problems(recipe: Recipe, recipe_dir: Path) -> list[str]:
    """Return what the run would refuse, as far as first rows and file headers tell.

    Args:
        recipe: A valid recipe.
        recipe_dir: Directory of the recipe file.
    """
    return [
        *_targets(recipe),
        *_template(recipe),
        *_tools(recipe),
        *_positions(recipe),
        *_tokens(recipe),
        *_rows(recipe),
    ]


def server_problems(recipe: Recipe, shape: TrainingShape) -> list[str]:
    """Return why the run could not start its vLLM servers on this machine.

    Args:
        recipe: A valid recipe.
        shape: On which it would run.
    """
    if not isinstance(recipe, RFTRecipe) or not recipe.rollout.is_managed:
        return []
    from trainer.managed.run_servers import refuse_unmanageable  # httpx, which costs a fifth of `check`

    try:
        refuse_unmanageable(recipe, shape)
    except LaunchError as error:
        return [str(error)]
    return []


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
        is_played = isinstance(recipe, RFTRecipe) and recipe.rollout.environment is not None
        problems += [problem for row in rows if not is_played and (problem := _row_problem(row, recipe)) is not None]
        if isinstance(recipe, RFTRecipe) and not problems:
            try:
                refuse_unscorable_rows(recipe.reward_functions, rows, recipe.reward_column)
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


def _tools(recipe: Recipe) -> Iterator[str]:
    """A chat template whose text never names tools, where the recipe has some."""
    if not isinstance(recipe, RFTRecipe) or not recipe.rollout.tools:
        return
    text = _template_text(recipe)
    if text is not None and "tools" not in text:
        yield f"model.chat_template: {NO_TOOLS}"


def _template_text(recipe: Recipe) -> str | None:
    """The chat template, as far as files here tell; None where they do not."""
    named, directory = recipe.model.chat_template, Path(recipe.model.path)
    if named is not None:
        file = TEMPLATES / f"{named}.jinja" if named in BUILTIN_TEMPLATES else Path(named)
        return _read_text(file)
    file = directory / "chat_template.jinja"  # takes precedence in transformers
    in_settings = (_read_json(directory / "tokenizer_config.json") or {}).get("chat_template")
    return _read_text(file) or (in_settings if isinstance(in_settings, str) else None)


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _positions(recipe: Recipe) -> Iterator[str]:
    config = _decoder_config(recipe)
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        return
    if recipe.data.max_seq_tokens > limit * _stretch(config, limit):
        yield (
            f"data.max_seq_tokens: {recipe.data.max_seq_tokens:,} tokens, but the model has {limit:,} positions "
            "(max_position_embeddings in its config.json)"
        )


def _stretch(config: Mapping[str, Any], limit: int) -> float:
    """Factor by which scaled rotary embeddings extend the positions; 1 where `limit` already counts them.

    Qwen2.5 with YaRN has 32,768 positions and a factor of 4 that is not in them; Llama 3.1 has 131,072 and a factor
    of 8 on 8,192 that is.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or not isinstance(rope.get("factor"), int | float):
        return 1.0
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    is_counted = isinstance(original, int) and original < limit
    return 1.0 if is_counted else max(1.0, float(rope["factor"]))


def _tokens(recipe: Recipe) -> Iterator[str]:
    """Tokens that template, settings or first rows use and that have no row in the model's embedding."""
    directory = Path(recipe.model.path)
    rows = _decoder_config(recipe).get("vocab_size")
    added = (_read_json(directory / "tokenizer.json") or {}).get("added_tokens")
    if not isinstance(rows, int) or not isinstance(added, list):
        return
    missing = {token["content"]: token["id"] for token in added if token.get("id", 0) >= rows}
    if not missing:
        return
    used = _texts(recipe)
    for token, number in missing.items():
        if any(token in text for text in used):
            yield (
                f"{directory}: the token {token!r} (id {number:,}) has no row in the model's embedding ({rows:,} "
                "rows). Remove the token from tokenizer, template and rows, or enlarge the model first."
            )


def _texts(recipe: Recipe) -> list[str]:
    """What may contain special tokens: the chat template, the tokenizer's settings, the first rows."""
    directory = Path(recipe.model.path)
    override = recipe.model.chat_template
    files = [directory / "tokenizer_config.json", *directory.glob("chat_template*")]
    files += [Path(override)] if override is not None else []
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    settings = _read_json(directory / "tokenizer_config.json")
    if settings is not None:
        texts[0] = json.dumps([settings.get(name) for name in USED_SETTINGS], ensure_ascii=False)
    for source in filter(None, (recipe.data.train, recipe.data.eval)):
        if _is_local(source):
            with suppress(DataError):  # reported by itself
                rows = read_rows(source, recipe.data, NUM_ROWS, [])
                texts += [json.dumps(dict(row), ensure_ascii=False, default=str) for row in rows]
    return texts


def _decoder_config(recipe: Recipe) -> Mapping[str, Any]:
    """The decoder's part of config.json; empty where there is none here."""
    config = _read_json(Path(recipe.model.path) / "config.json") or {}
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
