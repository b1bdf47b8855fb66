"""Supervised fine-tuning: the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.order import rows_of_step
from trainer.data.token_table import TokenTable
from trainer.model.batch import Batch, split_evenly
from trainer.model.policy import Policy
from trainer.training.attempt import Attempt
from trainer.training.dropout import seed_dropout
from trainer.training.losses import sft_loss
from trainer.training.memory_preflight import probe_memory
from trainer.training.metrics import Values
from trainer.training.row_trees import plan_packs
from trainer.training.sample_answers import SampleAnswers
from trainer.training.schedule import adam_params
from trainer.training.token_rows import open_rows


def train(attempt: Attempt) -> None:
    """Train from the newest checkpoint to the last step.

    Raises:
        UserError: rows or model cannot be trained on.
        PreemptedError: asked to stop; the state is saved.
    """
    plan, recipe, world = attempt.plan, attempt.plan.recipe, attempt.world
    encoder = ChatEncoder(load_tokenizer(recipe.model), recipe.model, recipe.data)
    rows = open_rows(attempt, encoder, recipe.data.train, "train", None)
    held_out = None
    if recipe.data.eval is not None:
        held_out = open_rows(attempt, encoder, recipe.data.eval, "held-out", recipe.data.eval_rows)
    attempt.count_trained_rows(rows.num_rows)
    plan = attempt.plan
    learner = attempt.open_learner()
    attempt.resume(learner)
    probe_memory(learner, plan)
    excluded = rows.rows_at(attempt.bad_rows.excluded)

    def evaluate() -> Values:
        return {} if held_out is None else {"eval/loss": _held_out_loss(attempt, learner.policy, held_out)}

    answers = SampleAnswers(attempt, encoder)
    attempt.evaluate_at_start(learner, evaluate)
    answers.record(learner.policy)
    while attempt.step < plan.steps:
        start = time.perf_counter()
        chosen = rows_of_step(recipe.seed, attempt.step, recipe.rows_per_step, rows.num_rows, excluded)
        step_sequences = rows.sequences_of(chosen)
        own = _of_rank(attempt, rows, step_sequences)
        seed_dropout(recipe, attempt.step, world.rank)
        with attempt.abandonable(learner):
            update = learner.learn(
                _packs(attempt, learner.policy, rows, own),
                sft_loss,
                adam_params(recipe.optimizer, attempt.step, plan.steps),
                denominator=sum(sum(rows.sequence(number).inputs.weights) for number in own),
            )
        tokens = sum(rows.lengths(step_sequences))
        values = {f"train/{name}": value for name, value in update.metrics.items()}
        values |= attempt.performance(tokens=tokens, step_s=time.perf_counter() - start)
        attempt.end_step(learner, values, evaluate, update.skipped_rows)
    attempt.finish(learner)
    answers.record(learner.policy)


@torch.no_grad()
def _held_out_loss(attempt: Attempt, policy: Policy, rows: TokenTable) -> float:
    """Mean loss over the held-out rows of all ranks, weighted as in training."""
    policy.eval()
    total = weight = 0.0
    for batch in _packs(attempt, policy, rows, _of_rank(attempt, rows, range(rows.counts.num_sequences))):
        total += float(sft_loss(policy(batch), batch).loss.sum(dtype=torch.float64))
        weight += float(batch.inputs.weights.sum(dtype=torch.float64))
    total, weight = attempt.world.sum_of([total, weight])
    return total / weight


def _packs(attempt: Attempt, policy: Policy, rows: TokenTable, numbers: Sequence[int]) -> Iterator[Batch]:
    """Micro-batches within the shape's token budget; as many on each rank as on the others if the base is sharded.

    Args:
        attempt: has the shape and the ranks.
        policy: whether it packs sequences.
        rows: read one micro-batch at a time.
        numbers: of the sequences.
    """
    groups = plan_packs(rows, numbers, policy.pack_limit(attempt.plan.shape.micro_batch_tokens))
    # Asked before the first pack: a rank that asks after its last one waits for ranks that wait for it in a gather.
    (num_dummies,) = attempt.world.num_dummies([len(groups)])
    for group in groups:
        attempt.stop.moved()
        yield Batch.pack_trees([tree.read(rows) for tree in group], attempt.world.device)
    for _ in range(num_dummies):
        yield Batch.dummy(attempt.world.device)


def _of_rank(attempt: Attempt, rows: TokenTable, numbers: Sequence[int]) -> list[int]:
    """The sequences that this rank computes, balanced by tokens; those of a row stay together."""
    units = rows.by_row(numbers)
    parts = split_evenly([sum(rows.lengths(unit)) for unit in units], attempt.world.size)
    return [number for index in parts[attempt.world.rank] for number in units[index]]
