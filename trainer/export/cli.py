"""Parses the arguments of `trainer export` and writes the export."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from transformers.utils import logging

from trainer.errors import ModelError, TrainerError
from trainer.export.merge import write_merged, write_plain
from trainer.export.ollama import modelfile
from trainer.export.weights import Weights, choose_weights
from trainer.files import replaced_directory
from trainer.planning.plan import Plan
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
    parser.add_argument("--gguf", choices=("bf16", "f16", "q8_0"))
    parser.add_argument("--converter")
    parser.add_argument("--ollama", action="store_true")
    parser.add_argument("--out")
    return parser


def _export(arguments: argparse.Namespace) -> Path:
    run = RunDir(Path(arguments.run))
    plan = run.read_plan()
    is_merged = arguments.merge and plan.recipe.lora is not None
    if arguments.converter and not arguments.gguf:
        raise ModelError("--converter goes with --gguf")
    for_ollama = _modelfile(run, plan, arguments)
    weights = choose_weights(run, plan, best=arguments.best, checkpoint=arguments.checkpoint)
    _say(f"{run.root}: {weights}")
    default = run.exported("gguf" if arguments.gguf else "merged" if arguments.merge else "export")
    out = Path(arguments.out) if arguments.out else default
    with replaced_directory(out) as directory:
        if arguments.gguf is None:
            _write_files(plan, weights, directory, is_merged=is_merged)
        else:
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as files:
                _write_files(plan, weights, Path(files), is_merged=is_merged)
                _write_gguf(plan, Path(files), directory / _gguf_name(run, arguments), arguments)
        if for_ollama is not None:
            (directory / "Modelfile").write_text(for_ollama, encoding="utf-8")
    return out


def _gguf_name(run: RunDir, arguments: argparse.Namespace) -> str:
    return f"{run.name}-{arguments.gguf}.gguf"


def _modelfile(run: RunDir, plan: Plan, arguments: argparse.Namespace) -> str | None:
    """The Modelfile, where the user asked for it."""
    if not arguments.ollama:
        return None
    if not arguments.gguf or (plan.recipe.lora is not None and not arguments.merge):
        needed = "--gguf q8_0" if plan.recipe.lora is None else "--merge --gguf q8_0"
        raise ModelError(f"--ollama needs a whole model as GGUF: add {needed} (or bf16, f16)")
    return modelfile(plan, _gguf_name(run, arguments))


def _write_files(plan: Plan, weights: Weights, directory: Path, *, is_merged: bool) -> None:
    _say(str((write_merged if is_merged else write_plain)(plan, weights, directory)))


def _write_gguf(plan: Plan, files: Path, file: Path, arguments: argparse.Namespace) -> None:
    """Write the exported files as one GGUF file."""
    try:
        from trainer.export.gguf_export import export_adapter, export_model
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ModelError("--gguf needs the package gguf: pip install 'tunesmith[gguf]'") from None
    from trainer.export.verification import sample_rows

    converter = Path(arguments.converter) if arguments.converter else None
    sample = sample_rows(plan)
    if plan.recipe.lora is not None and not arguments.merge:
        checked = export_adapter(plan, files, file, arguments.gguf, sample, converter)
    else:
        checked = export_model(files, file, arguments.gguf, sample, converter)
    _say(str(checked or f"{file.name}: written by {converter}; transformers cannot read it, so it was not verified"))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
