"""Writes a saved state of the training API for other programs: its adapter, or base and adapter merged."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch

from trainer.checkpoints.saved_state import StateSettings, state_problem
from trainer.config.recipe import ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.data.tokens import TokenSequence
from trainer.errors import CheckpointError, ModelError
from trainer.export.merge import Trained, merge_adapter
from trainer.export.verification import (
    Sample,
    Verification,
    load_plain,
    mean_difference,
    plain_logprobs,
    policy_logprobs,
)
from trainer.files import replaced_directory
from trainer.model.adapters import RUN_ADAPTER
from trainer.model.policy import Policy, load_policy
from trainer.planning.identity import model_digest

TEXTS: Final = (
    "What is 12 + 30? The sum of 12 and 30 is 42.",
    "The capital of France is Paris, and that of Italy is Rome.",
    "def add(first, second):\n    return first + second\n",
)
"""A state has no rows of its own: files and policy are compared on these."""
ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
REFUSED: Final = ("best", "checkpoint", "converter", "ollama", "push", "public", "intended_use")
CPU: Final = torch.device("cpu")


def export_state(directory: Path, arguments: argparse.Namespace) -> Path:
    """Export a state; returns the directory that was written.

    Args:
        directory: of the state.
        arguments: of the command line.

    Raises:
        CheckpointError: the state is damaged, or its base is another model now.
        ModelError: an argument goes with runs only, or the files do not compute what the policy does.
    """
    given = [f"--{name.replace('_', '-')}" for name in REFUSED if getattr(arguments, name) not in (None, False)]
    if given:
        raise ModelError(f"{directory}: {', '.join(given)} goes with a run; this is a saved state of the training API")
    if arguments.out is None:
        raise ModelError(f"{directory}: add --out DIR: a saved state does not change, so nothing is written into it")
    if arguments.gguf and not arguments.merge:
        raise ModelError(f"{directory}: --gguf of a saved state needs --merge")
    problem = state_problem(directory)
    if problem is not None:
        raise CheckpointError(problem)
    settings = StateSettings.read(directory)
    model = ModelSettings(path=settings.model)
    if not Path(model.path).is_dir():
        raise CheckpointError(f"{directory}: its base {model.path} is not here; run this where that path begins")
    if model_digest(model.path) != settings.base:
        raise CheckpointError(f"{directory}: its base {model.path} has changed since it was trained")
    out = Path(arguments.out)
    with replaced_directory(out) as target:
        for line in _write(directory, settings, model, arguments, target):
            sys.stderr.write(f"{line}\n")
    return out


def _write(
    directory: Path, settings: StateSettings, model: ModelSettings, arguments: argparse.Namespace, target: Path
) -> list[str]:
    """Write the files; returns what was verified."""
    sample = _sample(model)
    trained = Trained(sample, policy_logprobs(_policy(directory, settings, model), sample), directory)
    if not arguments.merge:
        for name in ADAPTER_FILES:
            shutil.copyfile(directory / name, target / name)
        return [str(_verify_adapter(model, trained, target))]
    if not arguments.gguf:
        return [str(merge_adapter(model, directory, trained, target))]
    from trainer.export.gguf_export import export_model

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as files:
        merged = str(merge_adapter(model, directory, trained, Path(files)))
        name = f"{directory.name}-{arguments.gguf}.gguf"
        return [merged, str(export_model(Path(files), target / name, arguments.gguf, sample, None))]


def _sample(model: ModelSettings) -> Sample:
    tokenizer = load_tokenizer(model)
    texts = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    sequences = tuple(TokenSequence(ids, (True,) * len(ids)) for ids in texts)
    return Sample(sequences, len(sequences), is_held_out=True, noun="text")


def _policy(directory: Path, settings: StateSettings, model: ModelSettings) -> Policy:
    """Base and adapter in float32, as training computes them."""
    policy = load_policy(model.model_copy(update={"compute_dtype": "float32"}), settings.lora, 0, CPU)
    policy.eval()
    assert policy.adapters is not None
    saved = policy.adapters.load_tensors(RUN_ADAPTER, directory)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            parameter.copy_(saved[name])
    return policy


def _verify_adapter(model: ModelSettings, trained: Trained, target: Path) -> Verification:
    from peft import PeftModel

    base = load_plain(model.path)
    before = mean_difference(plain_logprobs(base, trained.sample), trained.logprobs)
    read = PeftModel.from_pretrained(base, str(target)).eval()
    written = mean_difference(plain_logprobs(read, trained.sample), trained.logprobs)
    verified = Verification(trained.sample, written=written, base=before)
    if not verified.is_same_model:
        raise ModelError(f"{trained.source}: the exported files are another model ({verified})")
    return verified
