"""Held-out values of a model, one per row, so that two models can be compared row by row."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from trainer.config.recipe import DataSettings
from trainer.config.rft_sections import RewardLimits, RewardSpec
from trainer.data.chat import ChatEncoder
from trainer.data.tokens import TokenSequence
from trainer.errors import ModelError, RewardError
from trainer.inference.chat_model import ChatModel
from trainer.model.batch import Batch
from trainer.rewards.judges.open import Judging
from trainer.rewards.judges.protocol import Surroundings
from trainer.rewards.runner import ALL_ABSTAINED, RewardRunner
from trainer.sampling.sampler import SamplingParams
from trainer.training.evaluate import CHUNK_PROMPTS, HeldOutAnswer, PassRule, pass_at_k
from trainer.training.group_sampler import with_score
from trainer.training.losses import sft_loss
from trainer.types import Rollout, Row

PACK_TOKENS: Final = 2048
"""Tokens of one forward pass of the loss."""


@final
@dataclass(frozen=True)
class AnsweredRow:
    """A held-out prompt, and a model's answers to it."""

    row: Row
    answers: tuple[HeldOutAnswer, ...]
    """Without those on which every reward abstained."""
    num_failed: int
    pass_rule: PassRule | None = None
    num_samples: int = 1
    """Answers that were drawn: the k of pass@k."""

    def values(self) -> dict[str, float] | None:
        """Means over the answers, by name; None where every reward abstained on all of them.

        With two answers of rewards 1 and 0: `{"reward": 0.5, "reward/right": 0.5, "completion_tokens": 7.5, ...}`.
        """
        if not self.answers:
            return None
        number = len(self.answers)
        return {
            "reward": math.fsum(answer.earned for answer in self.answers) / number,
            **self._passed(),
            **self._parts(),
            "completion_tokens": sum(answer.num_tokens for answer in self.answers) / number,
            "truncated_frac": sum(answer.finish_reason == "length" for answer in self.answers) / number,
        }

    def _passed(self) -> dict[str, float]:
        """pass@k of this row, for one answer and for all of them."""
        if self.pass_rule is None:
            return {}
        passed = [[self.pass_rule.passes(answer) for answer in self.answers if self.pass_rule.judges(answer)]]
        if not passed[0]:
            return {}
        return {f"pass_at_{k}": pass_at_k(passed, k) for k in sorted({1, self.num_samples})}

    def _parts(self) -> dict[str, float]:
        """Mean of each reward over the answers that it judged and did not abstain on; 0 where one failed."""
        names = sorted({name for answer in self.answers for name in answer.rewards if "/" not in name})
        parts = {}
        for name in names:
            values = [
                answer.rewards.get(name) or 0.0
                for answer in self.answers
                if answer.rewards.get(name) is not None
                or (answer.reward is None and (name in answer.rewards or not answer.rewards))
            ]
            if values:
                parts[f"reward/{name}"] = math.fsum(values) / len(values)
        return parts


@final
@dataclass(frozen=True)
class RewardedRows:
    """Rows, and the rewards that score answers to them."""

    rows: Sequence[Row]
    rewards: Sequence[RewardSpec]
    base_dir: Path
    """What `file.py:function` is relative to."""
    limits: RewardLimits
    pass_rule: PassRule | None = None
    column: str | None = None
    """Field of the rows that names the rewards which judge it; None for all."""

    def answered_by(self, model: ChatModel, params: SamplingParams, num_samples: int) -> list[AnsweredRow]:
        """Answer every row in chunks, as evaluations in training do, and score the answers.

        Args:
            model: answers.
            params: how tokens are drawn.
            num_samples: answers per row.

        Raises:
            DataError: a row is no prompt.
            RewardError: a reward cannot be loaded, or fails on more than `max_failed_frac` of the answers.
        """
        for row in self.rows:
            model.prompt_ids(row)  # a mistake in the last row is said before time is spent
        with RewardRunner(
            self.rewards,
            base_dir=self.base_dir,
            num_workers=self.limits.num_workers,
            timeout_s=self.limits.timeout_s,
            memory_limit_gib=self.limits.memory_limit_gib,
            column=self.column,
            judging=Judging(around=Surroundings(_say, may_wait=False)),
        ) as runner:
            chunks = (self.rows[begin : begin + CHUNK_PROMPTS] for begin in range(0, len(self.rows), CHUNK_PROMPTS))
            rollouts = [pair for chunk in chunks for pair in _rollouts(model, chunk, params, num_samples, runner)]
        self._refuse_failures([rollout for _, of_row in rollouts for rollout in of_row])
        return [_answered(row, of_row, self.pass_rule, num_samples) for row, of_row in rollouts]

    def _refuse_failures(self, rollouts: Sequence[Rollout]) -> None:
        failures = [each.failure or "" for each in rollouts if _has_failed(each)]
        if len(failures) > self.limits.max_failed_frac * len(rollouts):
            raise RewardError(
                f"a reward failed on {len(failures)} of {len(rollouts)} answers, more than "
                f"reward_limits.max_failed_frac ({self.limits.max_failed_frac:g}). The first:\n{failures[0]}"
            )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _rollouts(
    model: ChatModel, rows: Sequence[Row], params: SamplingParams, num_samples: int, runner: RewardRunner
) -> Iterator[tuple[Row, list[Rollout]]]:
    drawn = [
        [Rollout.of_completion(model.prompt_ids(row), completion) for completion in completions]
        for row, completions in zip(rows, model.sample(rows, params, num_samples), strict=True)
    ]
    opened = [model.encoder.prefilled(model.prompt_ids(row)) for row in rows]
    items = [
        (prefilled + rollout.text, row)
        for row, prefilled, of_row in zip(rows, opened, drawn, strict=True)
        for rollout in of_row
    ]
    scores = iter(runner.score(items, [len(of_row) for of_row in drawn]))
    for row, of_row in zip(rows, drawn, strict=True):
        yield row, [with_score(rollout, next(scores)) for rollout in of_row]


def _has_failed(rollout: Rollout) -> bool:
    return rollout.reward is None and rollout.failure != ALL_ABSTAINED


def _answered(row: Row, rollouts: Sequence[Rollout], rule: PassRule | None, num_samples: int) -> AnsweredRow:
    answers = tuple(HeldOutAnswer.of_rollout(each) for each in rollouts if each.failure != ALL_ABSTAINED)
    return AnsweredRow(row, answers, sum(map(_has_failed, rollouts)), rule, num_samples)


@final
@dataclass(frozen=True)
class RowLoss:
    """The loss of a held-out row, for example a sum of 12.5 over 10 trained tokens: 1.25 a token."""

    row: Row
    total: float
    """Sum over trained tokens, weighted as in training."""
    weight: float
    sequences: tuple[TokenSequence, ...]

    @property
    def mean(self) -> float:
        """Loss per trained token."""
        return self.total / self.weight


def held_out_losses(model: ChatModel, rows: Sequence[Row], data: DataSettings) -> list[RowLoss]:
    """The loss of each row, as in training; rows that `data.overlong` drops are left out.

    Args:
        model: whose loss it is.
        rows: of sft.
        data: of the recipe.

    Raises:
        DataError: a row cannot be trained on.
    """
    encoder = ChatEncoder(model.tokenizer, model.source.model, data)
    encoded = [(row, sequences) for row in rows for sequences in _sequences(encoder, row)]
    losses = []
    for pack in _packs(encoded):
        losses += _losses_of(model, pack)
    return losses


def _sequences(encoder: ChatEncoder, row: Row) -> Iterator[tuple[TokenSequence, ...]]:
    kept, _ = encoder.within_limit(encoder.tokenize([encoder.prepare(row)])[0])
    if kept:
        yield kept


EncodedRow = tuple[Row, tuple[TokenSequence, ...]]


def _packs(rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
    """Consecutive rows of at most `PACK_TOKENS` tokens together; a longer row is alone."""
    pack: list[EncodedRow] = []
    used = 0
    for row, sequences in rows:
        size = sum(len(sequence.token_ids) for sequence in sequences)
        if pack and used + size > PACK_TOKENS:
            yield pack
            pack, used = [], 0
        pack.append((row, sequences))
        used += size
    if pack:
        yield pack


@torch.no_grad()
def _losses_of(model: ChatModel, pack: Sequence[EncodedRow]) -> list[RowLoss]:
    batch = Batch.pack([sequence for _, sequences in pack for sequence in sequences], model.device)
    model.policy.eval()
    terms = sft_loss(model.policy(batch), batch).loss.double()
    sizes = [sum(sequence.num_trained for sequence in sequences) for _, sequences in pack]
    if sum(sizes) != len(terms):
        raise ModelError("the loss has another number of tokens than the rows")
    losses, weights = terms.split(sizes), batch.inputs.weights.double().split(sizes)
    return [
        RowLoss(row, float(loss.sum()), float(weight.sum()), sequences)
        for (row, sequences), loss, weight in zip(pack, losses, weights, strict=True)
    ]


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """The loss over all trained tokens, `eval/loss` of a run."""
    return math.fsum(each.total for each in losses) / math.fsum(each.weight for each in losses)


def refuse_other_tokens(first: Sequence[RowLoss], second: Sequence[RowLoss]) -> None:
    """Refuse to compare losses per token where the tokens differ.

    Raises:
        ModelError: the models turn the rows into other tokens.
    """
    if [each.sequences for each in first] != [each.sequences for each in second]:
        raise ModelError(
            "the two models turn the rows into different tokens (tokenizer or chat template), so their losses per "
            "token cannot be compared. Compare answers: give a --reward."
        )


def row_values(losses: Sequence[RowLoss]) -> dict[int, Mapping[str, float]]:
    """The loss of each row by its index."""
    return {each.row.index: {"loss": each.mean} for each in losses}


def answer_values(rows: Sequence[AnsweredRow]) -> dict[int, Mapping[str, float]]:
    """The values of each row by its index, without rows on which every reward abstained."""
    return {each.row.index: values for each in rows if (values := each.values()) is not None}
