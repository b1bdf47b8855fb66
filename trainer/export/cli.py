"""Parses the arguments of `trainer export` and writes the export."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from transformers.utils import logging

from trainer.errors import TrainerError
from trainer.export.merge import write_merged, write_plain
from trainer.export.weights import choose_weights
from trainer.files import replaced_directory
from trainer.run.directory import RunDir


def main(argv: list[str] | None = None) -> int:
    """Export one run; prints the directory of the export."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        sys.stdout.write(f"{_export(arguments)}\n")
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer.export", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--checkpoint", type=int)
    parser.add_argument("--out")
    return parser


def _export(arguments: argparse.Namespace) -> Path:
    run = RunDir(Path(arguments.run))
    plan = run.read_plan()
    weights = choose_weights(run, plan, best=arguments.best, checkpoint=arguments.checkpoint)
    sys.stderr.write(f"{run.root}: {weights}\n")
    is_merged = arguments.merge and plan.recipe.lora is not None
    out = Path(arguments.out) if arguments.out else run.exported("merged" if arguments.merge else "export")
    with replaced_directory(out) as directory:
        write = write_merged if is_merged else write_plain
        sys.stderr.write(f"{write(plan, weights, directory)}\n")
    return out
