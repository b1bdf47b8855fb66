"""Compares an exported model with the trained policy, on rows of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.export.weights import CPU
from trainer.model.base_model import model_class
from trainer.model.batch import Batch
from trainer.model.own_forward import own_logprobs
from trainer.model.policy import Policy, score
from trainer.planning.plan import Plan
from trainer.types import Row

NUM_ROWS: Final = 4
"""Rows that an export is verified on."""
MERGE_TOLERANCE: Final = 1e-3
"""Largest mean change of a logprob by merging, or by another implementation, in float32."""
ROUNDING_TOLERANCE: Final = 0.25
"""Largest mean change of a logprob by rounding to the base's dtype, relative to the change that the training made."""


@final
@dataclass(frozen=True)
class Sample:
    """The rows that an export is verified on."""

    sequences: tuple[TokenSequence, ...]
    num_rows: int
    is_held_out: bool
    """Whether the run has not trained on them."""
    noun: str = "row"
    """What people call one."""

    def __str__(self) -> str:
        kind = "held-out" if self.is_held_out else "training"
        return f"{self.num_rows} {kind} {self.noun}{'s' if self.num_rows != 1 else ''}"


@final
@dataclass(frozen=True)
class Verification:
    """Mean absolute differences of logprobs from those of the trained policy.

    For example merged 2e-6, written 0.004, base 0.9: merging changed almost nothing, rounding little, and the training
    much.
    """

    sample: Sample
    written: float
    """Of the exported files, read back by transformers and PEFT."""
    base: float
    """Of the base model before the training."""
    merged: float = 0.0
    """Of the merged model in float32; 0 where nothing was merged."""

    @property
    def has_learned(self) -> bool:
        """Whether the policy can be told from its base."""
        return self.base > MERGE_TOLERANCE

    @property
    def is_same_model(self) -> bool:
        """Whether the exported files compute what the policy does."""
        limit = max(MERGE_TOLERANCE, ROUNDING_TOLERANCE * self.base)
        return self.merged <= MERGE_TOLERANCE and self.written <= limit

    def __str__(self) -> str:
        merged = f"{self.merged:.2g} merged, " if self.merged else ""
        return (
            f"verified on {self.sample}: logprobs differ from the trained policy's by {merged}{self.written:.2g} "
            f"as written, the base's by {self.base:.2g}"
        )


def sample_rows(plan: Plan) -> Sample:
    """The first held-out rows as tokens, or training rows where the recipe has no held-out ones."""
    recipe, data = plan.recipe, plan.recipe.data
    is_prompts = recipe.method == "rft"
    encoder = ChatEncoder(load_tokenizer(recipe.model), recipe.model, data, for_prompts=is_prompts)
    rows: list[Row] = read_rows(data.eval or data.train, data, NUM_ROWS)
    if is_prompts:
        token_ids = [encoder.encode_prompt(row) for row in rows]
    else:
        token_ids = [sequence.token_ids for sequence in encoder.encode(rows).sequences]
    sequences = tuple(TokenSequence(ids, (True,) * len(ids)) for ids in token_ids)
    return Sample(sequences, len(rows), is_held_out=data.eval is not None)


def load_plain(path: str, revision: str | None = None) -> PreTrainedModel:
    """A model as transformers alone loads it, in float32."""
    kind = model_class(path, revision)
    model: PreTrainedModel = kind.from_pretrained(path, revision=revision, dtype=torch.float32, use_safetensors=True)
    return model.eval()


def load_exported(plan: Plan, directory: str) -> torch.nn.Module:
    """An exported adapter on its base as PEFT loads it, or an exported model as transformers does."""
    model = plan.recipe.model
    if plan.recipe.lora is None:
        return load_plain(directory)
    return PeftModel.from_pretrained(load_plain(model.path, model.revision), directory).eval()


def policy_logprobs(policy: Policy, sample: Sample) -> torch.Tensor:
    """[N] logprob of every token but the first of each sequence, under the trained policy."""
    return torch.cat([score(policy, Batch.pack([sequence], CPU), 1.0) for sequence in sample.sequences])


@torch.inference_mode()
def plain_logprobs(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """[N] logprob of every token but the first of each sequence, by the model's own forward pass."""
    return torch.cat([own_logprobs(model, sequence.token_ids, CPU) for sequence in sample.sequences])


def mean_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean absolute difference."""
    return float((first - second).abs().mean())


def logits_of(model: torch.nn.Module, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
    """[T, V] float32 logits of each sequence."""
    with torch.inference_mode():
        ids = (torch.tensor(sequence.token_ids, device=CPU)[None] for sequence in sequences)
        return [model(input_ids=each, use_cache=False).logits[0].float() for each in ids]
