"""Supervised fine-tuning: the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from trainer.config.recipe import DataSource
from trainer.data.chat import ChatEncoder, EncodedRows, load_tokenizer
from trainer.data.order import rows_of_step
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.model.batch import Batch, micro_batches, split_evenly
from trainer.model.policy import Policy
from trainer.training.attempt import Attempt
from trainer.training.dropout import seed_dropout
from trainer.training.losses import sft_loss
from trainer.training.memory_preflight import probe_memory
from trainer.training.metrics import Values
from trainer.training.schedule import adam_params


def train(attempt: Attempt) -> None:
    """Train from the newest checkpoint to the last step.

    Raises:
        UserError: rows or model cannot be trained on.
        PreemptedError: asked to stop; the state is saved.
    """
    plan, recipe, world = attempt.plan, attempt.plan.recipe, attempt.world
    encoder = ChatEncoder(load_tokenizer(recipe.model), recipe.model, recipe.data)
    rows = _encode(attempt, encoder, recipe.data.train, "train")
    held_out = _encode(attempt, encoder, recipe.data.eval, "held-out").sequences if recipe.data.eval else ()
    attempt.count_trained_rows(len(rows.rows))
    plan = attempt.plan
    learner = attempt.open_learner()
    attempt.resume(learner)
    probe_memory(learner, plan)
    excluded = {index for index, (first, *_) in enumerate(rows.rows) if first.source in attempt.bad_rows.excluded}

    def evaluate() -> Values:
        return {"eval/loss": _held_out_loss(attempt, learner.policy, held_out)}

    attempt.evaluate_at_start(learner, evaluate)
    while attempt.step < plan.steps:
        start = time.perf_counter()
        chosen = rows_of_step(recipe.seed, attempt.step, recipe.rows_per_step, len(rows.rows), excluded)
        step_rows = [sequence for index in chosen for sequence in rows.rows[index]]
        rank_rows = _rows_of_rank(attempt, step_rows)
        seed_dropout(recipe, attempt.step, world.rank)
        with attempt.abandonable(learner):
            update = learner.learn(
                _packs(attempt, learner.policy, rank_rows),
                sft_loss,
                adam_params(recipe.optimizer, attempt.step, plan.steps),
                denominator=sum(sum(row.inputs.weights) for row in rank_rows),
            )
        tokens = sum(len(row.token_ids) for row in step_rows)
        values = {f"train/{name}": value for name, value in update.metrics.items()}
        values |= attempt.performance(tokens=tokens, step_s=time.perf_counter() - start)
        attempt.end_step(learner, values, evaluate, update.skipped_rows)
    attempt.finish(learner)


@torch.no_grad()
def _held_out_loss(attempt: Attempt, policy: Policy, sequences: Sequence[TokenSequence]) -> float:
    """Mean loss over the held-out rows of all ranks, weighted as in training."""
    policy.eval()
    total = weight = 0.0
    for batch in _packs(attempt, policy, _rows_of_rank(attempt, sequences)):
        total += float(sft_loss(policy(batch), batch).loss.sum(dtype=torch.float64))
        weight += float(batch.inputs.weights.sum(dtype=torch.float64))
    total, weight = attempt.world.sum_of([total, weight])
    return total / weight


def _packs(attempt: Attempt, policy: Policy, sequences: Sequence[TokenSequence]) -> Iterator[Batch]:
    """Micro-batches within the shape's token budget; as many on each rank as on the others if the base is sharded.

    Args:
        attempt: shape and ranks.
        policy: whether it packs sequences.
        sequences: of this rank.
    """
    groups = micro_batches(sequences, policy.pack_limit(attempt.plan.shape.micro_batch_tokens))
    for group in groups:
        attempt.stop.moved()
        yield Batch.pack(group, attempt.world.device)
    for _ in range(*attempt.world.num_dummies([len(groups)])):
        yield Batch.dummy(attempt.world.device)


def _rows_of_rank(attempt: Attempt, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The rows of a step that this rank trains on, balanced by tokens."""
    parts = split_evenly([len(sequence.token_ids) for sequence in sequences], attempt.world.size)
    return [sequences[index] for index in parts[attempt.world.rank]]


def _encode(attempt: Attempt, encoder: ChatEncoder, source: DataSource, name: str) -> EncodedRows:
    limit = attempt.plan.recipe.data.eval_rows if name == "held-out" else None
    encoded = encoder.encode(read_rows(source, encoder.data, limit))
    tokens = sum(len(sequence.token_ids) for sequence in encoded.sequences)
    trained = sum(sequence.num_trained for sequence in encoded.sequences)
    cut = f", {encoded.num_truncated} truncated" if encoded.num_truncated else ""
    cut += f", {encoded.num_dropped} dropped" if encoded.num_dropped else ""
    if encoded.num_split:
        cut += f", {encoded.num_split:,} rows as {len(encoded.sequences):,} sequences in all, one per rewritten turn"
    cut += f", white space changed by the template in {encoded.num_respaced:,} rows" if encoded.num_respaced else ""
    attempt.say(f"{name}: {encoded.num_rows:,} rows, {tokens:,} tokens, {trained:,} trained{cut}")
    return encoded
