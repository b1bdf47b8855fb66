"""`trainer import-config`: a configuration of Axolotl, LLaMA-Factory or TRL becomes a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainer.errors import EXIT_USER, UserError
from trainer.files import write_atomically
from trainer.run.console import tell
from trainer.run.plan_recipe import plan_recipe
from trainer.starter.foreign_config import as_recipe, translate


def import_config(arguments: argparse.Namespace) -> int:
    """Translate, write, and say what was translated, what is not needed and what is left; 2 if it needs more."""
    file = Path(arguments.config)
    if arguments.gpus < 1:
        raise UserError(f"--gpus must be 1 or more (got {arguments.gpus})")
    told = translate(file, arguments.tool, gpus=arguments.gpus)
    text = as_recipe(told, file)
    for title, lines in (("translated", told.done), ("not needed", told.not_needed), ("left to you", told.left)):
        for line in lines:
            tell(f"{title}: {line}")
    if arguments.out is None:
        sys.stdout.write(text)
        return 0
    out = Path(arguments.out)
    if out.exists() and not arguments.force:
        raise UserError(f"{out} exists. Name another file with --out, or replace it with --force.")
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}. Name another file with --out.") from None
    try:
        plan_recipe(out, [])
    except UserError as error:
        tell(f"{out}: written; it needs changes before it can be trained:\n{error}")
        return EXIT_USER
    sys.stdout.write(f"trainer check {out} --data\n")
    return 0
