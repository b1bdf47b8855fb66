"""Exports to GGUF and reads the file back: equal logits for bf16, bounded differences for the other types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Final, final

import torch
from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.errors import ModelError
from trainer.export.gguf_file import GGUFKind, read_adapter, write_adapter, write_model
from trainer.export.verification import Sample, load_plain, logits_of
from trainer.planning.plan import Plan

MAX_KL: Final = {"bf16": 1e-5, "f16": 1e-5, "q8_0": 0.02}
"""Largest mean KL(model || file) of a token's distribution, in nats."""


@final
@dataclass(frozen=True)
class GGUFCheck:
    """How far a GGUF file is from the model it was written from, for example q8_0: 0.98 and 0.0011."""

    sample: Sample
    max_logit: float
    """Largest difference of a logit."""
    mean_kl: float
    """Mean KL(model || file) of a token's distribution, in nats."""

    def __str__(self) -> str:
        distance = "equal" if self.max_logit == 0 else f"within {self.max_logit:.2g}, mean KL {self.mean_kl:.2g}"
        return f"GGUF read back on {self.sample}: logits {distance}"


def export_model(model: Path, file: Path, kind: GGUFKind, sample: Sample, converter: Path | None) -> GGUFCheck | None:
    """Write a model directory as a GGUF file, and read it back by transformers.

    Args:
        model: the exported model.
        file: the file to write.
        kind: how matrices are stored.
        sample: rows to compare logits on.
        converter: llama.cpp's convert_hf_to_gguf.py, used instead of ours.

    Returns:
        The differences; None if transformers cannot read a family that the converter wrote.

    Raises:
        ModelError: the family is not written here, or the file holds another model.
    """
    if converter is None:
        write_model(model, file, kind, file.stem)
    else:
        _convert([str(converter), str(model), "--outfile", str(file), "--outtype", kind])
    expected = logits_of(load_plain(str(model)), sample.sequences)
    config = AutoConfig.from_pretrained(model)  # transformers does not read all of it from the file
    try:
        with redirect_stderr(StringIO()):  # a progress bar that transformers has no setting for
            read = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=torch.float32
            )
    except ValueError:
        if converter is None:
            raise
        return None
    return _checked(file, kind, sample, expected, logits_of(read.eval(), sample.sequences))


def export_adapter(
    plan: Plan, adapter: Path, file: Path, kind: GGUFKind, sample: Sample, converter: Path | None
) -> GGUFCheck | None:
    """Write an adapter as a GGUF file, and compare the policy with one whose adapter is read from it.

    Args:
        plan: names the base model.
        adapter: the exported adapter.
        file: the file to write.
        kind: how matrices are stored.
        sample: rows to compare logits on.
        converter: llama.cpp's convert_lora_to_gguf.py, used instead of ours.

    Returns:
        The differences; None for a file of the converter, which is not read back.

    Raises:
        ModelError: family or adapter are not written here, or the file holds another adapter.
    """
    base, revision = plan.recipe.model.path, plan.recipe.model.revision
    if kind == "q8_0":
        raise ModelError("an adapter is not quantized: use `--gguf bf16` or `--gguf f16`, or add --merge")
    if converter is not None:
        _convert([str(converter), str(adapter), "--base", base, "--outfile", str(file), "--outtype", kind])
        return None
    write_adapter(adapter, base, revision, file, kind, file.stem)
    model = PeftModel.from_pretrained(load_plain(base, revision), str(adapter)).eval()
    expected = logits_of(model, sample.sequences)
    set_peft_model_state_dict(model, read_adapter(file, adapter, base, revision))
    return _checked(file, kind, sample, expected, logits_of(model, sample.sequences))


def _checked(
    file: Path, kind: GGUFKind, sample: Sample, expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]
) -> GGUFCheck:
    pairs = list(zip(expected, actual, strict=True))
    max_logit = max(float((first - second).abs().max()) for first, second in pairs)
    kl = torch.cat([_kl(first, second) for first, second in pairs])
    check = GGUFCheck(sample, max_logit, float(kl.mean()))
    if not check.mean_kl <= MAX_KL[kind]:
        raise ModelError(
            f"{file.name}: {check}; at most {MAX_KL[kind]} is accepted for {kind}. "
            + ("Use bf16 or f16." if kind == "q8_0" else "This is a defect of the export; please report it.")
        )
    return check


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[T] KL(first || second) of the distributions of two logits [T, V]."""
    log_first, log_second = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return (log_first.exp() * (log_first - log_second)).sum(-1)


def _convert(arguments: list[str]) -> None:
    """Run a converter of llama.cpp with this Python."""
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise ModelError(f"{arguments[0]} failed:\n{tail}")
