"""Exports a run's weights, merged into the base model if asked, and verifies them: `trainer export RUN`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError, TrainerError
from trainer.files import replaced_directory
from trainer.model.base_model import model_class
from trainer.model.own_forward import own_logprobs
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.types import Row

NUM_ROWS: Final = 4
"""Held-out rows that the export is verified on."""
MERGE_TOLERANCE: Final = 1e-3
"""Largest mean change of a logprob by merging in float32."""
ROUNDING_TOLERANCE: Final = 0.25
"""Largest mean change of a logprob by rounding to the base's dtype, relative to the change that the adapter made."""


@final
@dataclass(frozen=True)
class Verification:
    """Mean absolute differences of logprobs from those of base plus adapter, on held-out tokens.

    For example merged 2e-6, written 0.004, base 0.9: merging changed almost nothing, rounding little, and the adapter
    much.
    """

    num_rows: int
    merged: float
    """Of the merged model in float32."""
    written: float
    """Of the exported files, rounded to the base's dtype and read back."""
    base: float
    """Of the base model without the adapter."""

    @property
    def is_same_model(self) -> bool:
        """Whether the exported model computes what base and adapter do, and differs from the base."""
        is_merged = self.merged <= MERGE_TOLERANCE
        is_written = self.written <= ROUNDING_TOLERANCE * self.base
        return is_merged and is_written and self.base > MERGE_TOLERANCE


def main(argv: list[str] | None = None) -> int:
    """Export one run; prints the directory of the export."""
    parser = argparse.ArgumentParser(prog="trainer.export", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run = RunDir(Path(arguments.run))
        plan = run.read_plan()
        weights = run.weights(is_lora=plan.recipe.lora is not None, best=arguments.best)
        if not weights.is_dir():
            raise ModelError(f"{weights}: does not exist yet; let the run finish first (trainer status {run.root})")
        out = Path(arguments.out) if arguments.out else run.exported(is_merged=arguments.merge)
        if plan.recipe.lora is not None and arguments.merge:
            verified = merge(plan, weights, out)
            sys.stderr.write(
                f"verified on {verified.num_rows} held-out rows: logprobs differ from the adapter's by "
                f"{verified.merged:.2g} merged, {verified.written:.2g} as written in "
                f"{plan.recipe.model.compute_dtype}; the base's by {verified.base:.2g}\n"
            )
        else:
            with replaced_directory(out) as directory:
                shutil.copytree(weights, directory, dirs_exist_ok=True)
        sys.stdout.write(f"{out}\n")
    except TrainerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def merge(plan: Plan, adapter: Path, out: Path) -> Verification:
    """Merge an adapter into the base, write it in the base's dtype, read it back and compare.

    Args:
        plan: names the base model and the held-out rows.
        adapter: directory of the adapter.
        out: directory of the export; replaced as a whole.

    Raises:
        ModelError: the written model does not compute what base and adapter do; `out` is unchanged.
    """
    settings = plan.recipe.model
    tokenizer = load_tokenizer(settings)
    encoder = ChatEncoder(tokenizer, settings, plan.recipe.data, for_prompts=plan.recipe.method == "rft")
    sequences = _held_out(plan, encoder)
    base = _load(settings.path, settings.revision)
    base_logprobs = _logprobs(base, sequences)
    adapted = PeftModel.from_pretrained(base, str(adapter))
    adapter_logprobs = _logprobs(adapted, sequences)
    merged = adapted.merge_and_unload(safe_merge=True)
    merged_logprobs = _logprobs(merged, sequences)
    with replaced_directory(out) as directory:
        merged.to(getattr(torch, settings.compute_dtype)).save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))
        written_logprobs = _logprobs(_load(str(directory), None), sequences)
        verified = Verification(
            num_rows=len(sequences),
            merged=_difference(merged_logprobs, adapter_logprobs),
            written=_difference(written_logprobs, adapter_logprobs),
            base=_difference(base_logprobs, adapter_logprobs),
        )
        if not verified.is_same_model:
            raise ModelError(
                f"{out}: logprobs differ from the adapter's by {verified.merged:.3g} merged and "
                f"{verified.written:.3g} as written, the base's by {verified.base:.3g}. An adapter that learned "
                "nothing cannot be told from its base; otherwise use the adapter itself."
            )
    return verified


def _load(path: str, revision: str | None) -> PreTrainedModel:
    kind = model_class(path, revision)
    model: PreTrainedModel = kind.from_pretrained(path, revision=revision, dtype=torch.float32, use_safetensors=True)
    return model.eval()


def _held_out(plan: Plan, encoder: ChatEncoder) -> list[TokenSequence]:
    data = plan.recipe.data
    rows: list[Row] = read_rows(data.eval or data.train, data, NUM_ROWS)
    if plan.recipe.method == "sft":
        return list(encoder.encode(rows).sequences)
    prompts = [encoder.encode_prompt(row) for row in rows]
    return [TokenSequence(prompt, (True,) * len(prompt)) for prompt in prompts]


@torch.inference_mode()
def _logprobs(model: torch.nn.Module, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """[N] logprob of every token but the first of each sequence."""
    return torch.cat([own_logprobs(model, sequence.token_ids, torch.device("cpu")) for sequence in sequences])


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().mean())


if __name__ == "__main__":
    sys.exit(main())
