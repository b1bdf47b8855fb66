"""Parses the arguments of `trainer export` and writes the export."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

from trainer.checkpoints.saved_state import STATE_FILE
from trainer.errors import ModelError, TrainerError
from trainer.export.choice import Weights, choose_weights
from trainer.export.hub import push, refuse_unready
from trainer.export.merge import write_merged, write_plain
from trainer.export.model_card import CARD, Exported, model_card
from trainer.export.ollama import modelfile
from trainer.export.saved_state import export_state
from trainer.export.verification import sample_rows
from trainer.files import replaced_directory
from trainer.model.quiet import quiet_transformers
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.run.place import settle


def main(argv: list[str] | None = None) -> int:
    """Export one run; prints the directory of the export, and the address where it was uploaded."""
    arguments = _parser().parse_args(argv)
    quiet_transformers()
    try:
        shown = arguments.out
        for name in ("out", "converter"):
            if getattr(arguments, name) is not None:
                setattr(arguments, name, str(Path(getattr(arguments, name)).absolute()))
        if (Path(arguments.run) / STATE_FILE).is_file():
            sys.stdout.write(f"{export_state(Path(arguments.run), arguments)}\n")
            return 0
        run, plan = settle(RunDir(Path(arguments.run)))
        out = _Export(run, plan, arguments).write()
        sys.stdout.write(f"{shown or out}\n")
        if arguments.push:
            sys.stdout.write(f"{push(out, arguments.push, is_public=arguments.public)}\n")
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
    parser.add_argument("--push")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--intended-use")
    parser.add_argument("--out")
    return parser


@final
@dataclass(frozen=True)
class _Export:
    """One export: a run and what the user asked for."""

    run: RunDir
    plan: Plan
    arguments: argparse.Namespace

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is merged into its base."""
        return self.arguments.merge and self.plan.recipe.lora is not None

    @property
    def is_adapter(self) -> bool:
        """Whether the export needs its base model."""
        return self.plan.recipe.lora is not None and not self.is_merged

    @property
    def gguf_name(self) -> str | None:
        """Name of the GGUF file; None where none is written."""
        return f"{self.run.name}-{self.arguments.gguf}.gguf" if self.arguments.gguf else None

    def write(self) -> Path:
        """Write the files, verify them, and put them in place as a whole; returns their directory."""
        self._refuse_contradictions()
        name = self.gguf_name
        for_ollama = modelfile(self.plan, name) if self.arguments.ollama and name is not None else None
        if self.arguments.push:
            refuse_unready(self.arguments.push)
        weights = choose_weights(self.run, self.plan, best=self.arguments.best, checkpoint=self.arguments.checkpoint)
        _say(f"{self.run.root}: {weights}")
        default = self.run.exported("gguf" if name is not None else "merged" if self.arguments.merge else "export")
        out = Path(self.arguments.out) if self.arguments.out else default
        with replaced_directory(out) as directory:
            verifications = self._write(weights, directory)
            if for_ollama is not None:
                (directory / "Modelfile").write_text(for_ollama, encoding="utf-8")
            exported = Exported(
                weights,
                tuple(verifications),
                is_adapter=self.is_adapter,
                gguf_name=name,
                has_modelfile=for_ollama is not None,
                intended_use=self.arguments.intended_use,
            )
            (directory / CARD).write_text(model_card(self.run, self.plan, exported), encoding="utf-8")
        return out

    def _refuse_contradictions(self) -> None:
        arguments = self.arguments
        if arguments.converter and not arguments.gguf:
            raise ModelError("--converter goes with --gguf")
        if arguments.ollama and (not arguments.gguf or self.is_adapter):
            needed = "--merge --gguf q8_0" if self.is_adapter else "--gguf q8_0"
            raise ModelError(f"--ollama needs a whole model as GGUF: add {needed} (or bf16, f16)")
        if arguments.public and not arguments.push:
            raise ModelError("--public goes with --push")

    def _write(self, weights: Weights, directory: Path) -> list[str]:
        """Write the weights, as a GGUF file where asked for; returns what was verified."""
        if self.gguf_name is None:
            return [self._write_files(weights, directory)]
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as files:
            first = self._write_files(weights, Path(files))
            return [first, self._write_gguf(Path(files), directory / self.gguf_name)]

    def _write_files(self, weights: Weights, directory: Path) -> str:
        verified = (write_merged if self.is_merged else write_plain)(self.plan, weights, directory)
        return _say(str(verified))

    def _write_gguf(self, files: Path, file: Path) -> str:
        """Write the exported files as one GGUF file."""
        try:
            from trainer.export.gguf_export import export_adapter, export_model
        except ModuleNotFoundError as error:
            if error.name != "gguf":
                raise
            raise ModelError("--gguf needs the package gguf: pip install gguf") from None
        converter = Path(self.arguments.converter) if self.arguments.converter else None
        sample, kind = sample_rows(self.plan), self.arguments.gguf
        if self.is_adapter:
            checked = export_adapter(self.plan, files, file, kind, sample, converter)
        else:
            checked = export_model(files, file, kind, sample, converter)
        unverified = f"{file.name}: written by {converter}; it was not read back, since transformers cannot read it"
        return _say(unverified if checked is None else str(checked))


def _say(text: str) -> str:
    sys.stderr.write(f"{text}\n")
    return text
