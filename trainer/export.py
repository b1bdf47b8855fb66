"""Writes a model to use from a run, and verifies it: `trainer export RUN --merge`."""

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
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError, TrainerError
from trainer.files import replaced_directory
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.types import Row

NUM_ROWS: Final = 4
EXACT: Final = 1e-3
"""Mean distance of logprobs that merging in float32 may make."""
SHARE: Final = 0.25
"""Rounding what is written to the base's dtype may move logprobs by this share of what the adapter moved them."""


@final
@dataclass(frozen=True)
class Verification:
    """Mean distances of logprobs on held-out tokens."""

    num_rows: int
    merged: float
    """Of the merged model in float32 from the adapter's."""
    written: float
    """Of the files, rounded to the base's dtype and read back, from the adapter's."""
    base: float
    """Of the base model from the adapter's."""

    @property
    def is_same_model(self) -> bool:
        """Whether the merged model is the adapter's, and not the base."""
        return self.merged <= EXACT and self.written <= SHARE * self.base and self.base > EXACT


def main(argv: list[str] | None = None) -> int:
    """Export one run; prints the directory."""
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
        out = Path(arguments.out) if arguments.out else run.root / ("merged" if arguments.merge else "export")
        if plan.recipe.lora is not None and arguments.merge:
            found = merge(plan, weights, out)
            sys.stderr.write(
                f"verified on {found.num_rows} held-out rows: logprobs differ from the adapter's by "
                f"{found.merged:.2g} merged, {found.written:.2g} as written in {plan.recipe.model.compute_dtype}; "
                f"the base's by {found.base:.2g}\n"
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
    """Merge into a copy, write it in the base's dtype, read it back and compare.

    Raises:
        ModelError: what was written does not compute what the adapter does; nothing is left at `out`.
    """
    settings = plan.recipe.model
    tokenizer = load_tokenizer(settings)
    encoder = ChatEncoder(tokenizer, settings, plan.recipe.data, for_prompts=plan.recipe.method == "rft")
    sequences = _held_out(plan, encoder)
    base = _load(settings.path, settings.revision)
    of_base = _logprobs(base, sequences)
    adapted = PeftModel.from_pretrained(base, str(adapter))
    of_adapter = _logprobs(adapted, sequences)
    merged = adapted.merge_and_unload(safe_merge=True)
    of_merged = _logprobs(merged, sequences)
    with replaced_directory(out) as directory:
        merged.to(getattr(torch, settings.compute_dtype)).save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))
        of_written = _logprobs(_load(str(directory), None), sequences)
        distances = [_distance(other, of_adapter) for other in (of_merged, of_written, of_base)]
        found = Verification(len(sequences), *distances)
        if not found.is_same_model:
            raise ModelError(
                f"{out}: logprobs differ from the adapter's by {found.merged:.3g} merged and {found.written:.3g} as "
                f"written, the base's by {found.base:.3g}. An adapter that learned nothing cannot be told from its "
                "base; otherwise use the adapter itself."
            )
    return found


def _load(path: str, revision: str | None) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32, use_safetensors=True)
    return model.eval()


def _held_out(plan: Plan, encoder: ChatEncoder) -> list[TokenSequence]:
    data = plan.recipe.data
    rows: list[Row] = read_rows(data.eval or data.train, data, NUM_ROWS)
    if plan.recipe.method == "sft":
        return list(encoder.encode(rows).sequences)
    prompts = [encoder.encode_prompt(row) for row in rows]
    return [TokenSequence(prompt, (True,) * len(prompt)) for prompt in prompts]


@torch.inference_mode()
def _logprobs(model: torch.nn.Module, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence.token_ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1))
    return found


def _distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    return float((torch.cat(list(first)) - torch.cat(list(second))).abs().mean())


if __name__ == "__main__":
    sys.exit(main())
