"""Supervised fine-tuning: the loop."""

from __future__ import annotations

import time

import torch

from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.token_table import TokenTable
from trainer.model.policy import Policy
from trainer.training.attempt import Attempt
from trainer.training.dropout import seed_dropout
from trainer.training.losses import sft_loss
from trainer.training.memory_preflight import probe_memory
from trainer.training.metrics import Values
from trainer.training.sample_answers import SampleAnswers
from trainer.training.schedule import adam_params
from trainer.training.sft_packs import StepPacks, held_out_packs
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
    budget = learner.policy.pack_limit(plan.shape.pack_tokens)
    todo = range(attempt.step, plan.steps)
    with StepPacks(recipe, rows, world, budget, steps=todo, excluded=excluded) as packs:
        while attempt.step < plan.steps:
            start = time.perf_counter()
            step, own = packs.next_step(attempt.stop.moved)
            seed_dropout(recipe, attempt.step, world.rank)
            adam = adam_params(recipe.optimizer, attempt.step, plan.steps)
            with attempt.abandonable(learner):
                update = learner.learn(own, sft_loss, adam, denominator=step.denominator)
            values = {f"train/{name}": value for name, value in update.metrics.items()}
            values |= attempt.performance(tokens=step.num_tokens, step_s=time.perf_counter() - start)
            attempt.end_step(learner, values, evaluate, update.skipped_rows)
    attempt.finish(learner)
    answers.record(learner.policy)


@torch.no_grad()
def _held_out_loss(attempt: Attempt, policy: Policy, rows: TokenTable) -> float:
    """Mean loss over the held-out rows of all ranks, weighted as in training."""
    policy.eval()
    budget = policy.pack_limit(attempt.plan.shape.pack_tokens)
    sums = []
    for batch in held_out_packs(rows, attempt.world, budget, attempt.stop.moved):
        loss, weight = sft_loss(policy(batch), batch).loss, batch.inputs.weights
        sums.append(torch.stack([loss.sum(dtype=torch.float64), weight.sum(dtype=torch.float64)]))
    total = weights = 0.0
    for of_loss, of_weight in torch.stack(sums).tolist() if sums else []:  # read at once: reading waits for a GPU
        total += of_loss
        weights += of_weight
    total, weights = attempt.world.sum_of([total, weights])
    return total / weights
