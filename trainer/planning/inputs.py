"""Compares the files that a plan was made from with those that are there now.

Rows, model, chat template and warm-start adapter are part of a run's identity: with others it is another run. Held-out
rows and reward code may be replaced between two attempts; the change is recorded.
"""

from __future__ import annotations

from pathlib import Path

from trainer.config.length import count_rows
from trainer.config.recipe import BUILTIN_TEMPLATES, DataSource
from trainer.config.source_files import source_files
from trainer.errors import RunConflictError
from trainer.planning.identity import input_digests
from trainer.planning.plan import Plan


def changed_inputs(plan: Plan) -> list[str]:
    """What differs from the plan, one line each, for example "data.train (rows.jsonl): 24 rows, now 12"."""
    now = input_digests(plan.recipe).items()
    return [_difference(plan, path) for path, digest in now if _at(plan.identity, path) not in (digest, None)]


def refuse_changed_inputs(plan: Plan, run: str) -> None:
    """Stop where the plan's rows, model, chat template or warm-start adapter were replaced.

    Args:
        plan: as the run began.
        run: shown in the message.

    Raises:
        RunConflictError: they were; shows what differs.
    """
    changed = changed_inputs(plan)
    if changed:
        lines = "".join(f"\n  {line}" for line in changed)
        raise RunConflictError(
            f"{run} cannot continue: its inputs changed since it began:{lines}\n"
            "Restore them and run the same command again, or train the recipe under another --name."
        )


def _at(identity: object, path: str) -> object:
    """The value at a dotted path; None where the identity has none, as in a plan of an earlier version."""
    for name in path.split("."):
        identity = identity.get(name) if isinstance(identity, dict) else None
    return identity


def _difference(plan: Plan, path: str) -> str:
    recipe = plan.recipe
    if path == "data.digest":
        return f"data.train ({_shown(recipe.data.train)}): {_rows_difference(plan)}"
    named = {"model.digest": ("model.path", recipe.model.path)}
    if recipe.model.chat_template is not None:
        named["model.chat_template"] = ("model.chat_template", recipe.model.chat_template)
    if recipe.lora is not None and recipe.lora.warm_start is not None:
        named["lora.warm_start"] = ("lora.warm_start", recipe.lora.warm_start)
    field, value = named[path]
    is_there = Path(value).exists() or value in BUILTIN_TEMPLATES
    return f"{field} ({value}): {'other content' if is_there else 'no such file or directory'}"


def _rows_difference(plan: Plan) -> str:
    source = plan.recipe.data.train
    if not source.sources and source.path is not None and not source_files(source):
        return "no such file"
    rows = count_rows(source)
    if rows is not None and plan.num_rows is not None and rows != plan.num_rows:
        return f"{plan.num_rows:,} rows, now {rows:,}"
    return "other rows"


def _shown(source: DataSource) -> str:
    if source.sources:
        return ", ".join(map(_shown, source.sources))
    return source.path or f"hub {source.hub}"
