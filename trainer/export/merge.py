"""Writes the weights of a run: as they are, or merged into the base model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from trainer.config.recipe import ModelSettings
from trainer.data.chat import load_tokenizer
from trainer.errors import ModelError
from trainer.export.choice import Weights
from trainer.export.verification import (
    Sample,
    Verification,
    load_exported,
    load_plain,
    mean_difference,
    plain_logprobs,
    policy_logprobs,
    sample_rows,
)
from trainer.export.weights import load_trained, write_weights
from trainer.planning.plan import Plan


def write_plain(plan: Plan, weights: Weights, directory: Path) -> Verification:
    """Write the adapter or the trained model, read it back and compare.

    Args:
        plan: names the base model and the rows.
        weights: what is exported.
        directory: an existing, empty directory.

    Raises:
        ModelError: the written files do not compute what the trained policy does.
    """
    sample = sample_rows(plan)
    expected = _export_files(plan, weights, sample, directory)
    verified = Verification(
        sample,
        written=mean_difference(plain_logprobs(load_exported(plan, str(directory)), sample), expected),
        base=mean_difference(_base_logprobs(plan, sample), expected),
    )
    if not verified.is_same_model:
        raise ModelError(f"{weights.directory}: the exported files are another model ({verified})")
    return verified


def refuse_shared_weights(model: PeftModel) -> None:
    """Stop where one weight would have to hold the adapters of several layers, as in Zamba2's shared blocks.

    Raises:
        ModelError: two adapted layers have the same base weight.
    """
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            owner = owners.setdefault(layer.get_base_layer().weight.data_ptr(), name)
            if owner != name:
                shown = [each.removeprefix("base_model.model.") for each in (owner, name)]
                raise ModelError(
                    f"cannot be merged: {shown[0]} and {shown[1]} share one weight and have an adapter each. "
                    "Export without --merge; PEFT and this project load the adapter."
                )


def write_merged(plan: Plan, weights: Weights, directory: Path) -> Verification:
    """Merge an adapter into the base, write it in the base's dtype, read it back and compare.

    Args:
        plan: names the base model and the rows.
        weights: the adapter.
        directory: an existing, empty directory.

    Raises:
        ModelError: the written model does not compute what base and adapter do, or the adapter learned nothing.
    """
    sample = sample_rows(plan)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".adapter-") as adapter:
        expected = _export_files(plan, weights, sample, Path(adapter))
        return merge_adapter(plan.recipe.model, Path(adapter), Trained(sample, expected, weights.directory), directory)


@final
@dataclass(frozen=True)
class Trained:
    """What a merged model is compared with."""

    sample: Sample
    logprobs: torch.Tensor
    """[N] of the trained policy."""
    source: Path
    """Where its weights are from, for messages."""


def merge_adapter(settings: ModelSettings, adapter: Path, trained: Trained, directory: Path) -> Verification:
    """Merge an adapter that PEFT reads into its base, write it in the base's dtype, read it back and compare.

    Args:
        settings: of the base.
        adapter: its directory.
        trained: what base and adapter compute.
        directory: an existing, empty directory.

    Raises:
        ModelError: the written model does not compute what base and adapter do, or the adapter learned nothing.
    """
    sample, expected = trained.sample, trained.logprobs
    base = load_plain(settings.path, settings.revision)
    base_logprobs = plain_logprobs(base, sample)
    adapted = PeftModel.from_pretrained(base, adapter)
    refuse_shared_weights(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    merged_logprobs = plain_logprobs(merged, sample)
    merged.to(getattr(torch, settings.compute_dtype)).save_pretrained(str(directory))
    del base, adapted, merged
    load_tokenizer(settings).save_pretrained(str(directory))
    verified = Verification(
        sample,
        written=mean_difference(plain_logprobs(load_plain(str(directory)), sample), expected),
        base=mean_difference(base_logprobs, expected),
        merged=mean_difference(merged_logprobs, expected),
    )
    if not (verified.is_same_model and verified.has_learned):
        raise ModelError(
            f"{trained.source}: cannot be merged: logprobs differ from the trained policy's by "
            f"{verified.merged:.3g} merged and {verified.written:.3g} as written, the base's by {verified.base:.3g}. "
            "An adapter that learned nothing cannot be told from its base; otherwise export without --merge."
        )
    return verified


def _export_files(plan: Plan, weights: Weights, sample: Sample, directory: Path) -> torch.Tensor:
    """Write the weights; returns the logprobs of the trained policy."""
    policy = load_trained(plan, weights)
    expected = policy_logprobs(policy, sample)
    write_weights(plan, weights, policy, directory)
    return expected


def _base_logprobs(plan: Plan, sample: Sample) -> torch.Tensor:
    return plain_logprobs(load_plain(plan.recipe.model.path, plan.recipe.model.revision), sample)
