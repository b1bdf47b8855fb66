"""Supervised fine-tuning: the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from trainer.algorithms import sft
from trainer.algorithms.terms import PolicyTerms
from trainer.config.recipe import DataSource
from trainer.data.chat import ChatEncoder, EncodedRows, load_tokenizer
from trainer.data.order import rows_of_step
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.model.batch import Batch, micro_batches, split_evenly
from trainer.model.policy import Policy, Scores
from trainer.training.attempt import Session, Values
from trainer.training.memory_preflight import probe_memory
from trainer.training.schedule import learning_rate


def train(session: Session) -> None:
    """Train from the newest checkpoint to the end.

    Raises:
        UserError: rows or model cannot be trained on.
        PreemptedError: asked to stop; the state is saved.
    """
    plan, recipe, world = session.plan, session.plan.recipe, session.world
    tokenizer = load_tokenizer(recipe.model)
    encoder = ChatEncoder(tokenizer, recipe.model, recipe.data)
    rows = _encoded(session, encoder, recipe.data.train, "train")
    held_out = _encoded(session, encoder, recipe.data.eval, "held-out") if recipe.data.eval else None
    learner = session.open_learner()
    state = session.resume(learner)
    probe_memory(learner, plan)
    excluded = {index for index, (first, *_) in enumerate(rows.rows) if first.where in session.excluded}

    def evaluate() -> Values:
        assert held_out is not None
        return held_out_loss(session, learner.policy, held_out.sequences)

    if state.step == 0 and session.saved_step is None and held_out is not None:
        session.log.write(0, session.evaluated(learner, evaluate))
    while state.step < plan.steps:
        begin = time.perf_counter()
        chosen = rows_of_step(recipe.seed, state.step, recipe.rows_per_step, len(rows.rows), excluded)
        step_rows = [sequence for index in chosen for sequence in rows.rows[index]]
        mine = of_rank(session, step_rows)
        if recipe.lora is not None and recipe.lora.dropout > 0:
            torch.manual_seed(hash((recipe.seed, state.step, world.rank)))
        with session.stoppable(state, learner):
            learned = learner.learn(
                packs(session, mine),
                sft_terms,
                learning_rate=learning_rate(recipe.optimizer, state.step, plan.steps),
                denominator=sum(sum(row.inputs["weights"]) for row in mine),
            )
        state.step += 1
        tokens = sum(len(row.token_ids) for row in step_rows)
        values = {f"train/{name}": value for name, value in learned.items()}
        values |= session.performance(tokens=tokens, step_s=time.perf_counter() - begin)
        session.after_step(state, learner, values, evaluate)
    session.finish(learner)


def sft_terms(scores: Scores, batch: Batch) -> PolicyTerms:
    """The SFT loss of a pack."""
    return sft(scores.logprobs, batch.inputs["weights"])


@torch.no_grad()
def held_out_loss(session: Session, policy: Policy, sequences: Sequence[TokenSequence]) -> Values:
    """Mean loss of held-out rows over all ranks, weighted as in training."""
    policy.eval()
    total = weight = 0.0
    for batch in packs(session, of_rank(session, sequences)):
        weights = batch.inputs["weights"]
        total += float((sft_terms(policy(batch), batch).loss).sum(dtype=torch.float64))
        weight += float(weights.sum(dtype=torch.float64))
    total, weight = session.world.sum_of([total, weight])
    return {"eval/loss": total / weight}


def packs(session: Session, sequences: Sequence[TokenSequence]) -> Iterator[Batch]:
    """Micro-batches within the shape's token budget, equally many on all ranks where they must be."""
    groups = micro_batches(sequences, session.plan.shape.micro_batch_tokens)
    for group in groups:
        session.stop.moved()
        yield Batch.pack(group, session.world.device)
    for _ in range(*session.world.fillers([len(groups)])):
        yield Batch.filler(session.world.device, ("weights",))


def of_rank(session: Session, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The part of a step that belongs to this rank, balanced by tokens."""
    parts = split_evenly([len(sequence.token_ids) for sequence in sequences], session.world.size)
    return [sequences[index] for index in parts[session.world.rank]]


def _encoded(session: Session, encoder: ChatEncoder, source: DataSource, what: str) -> EncodedRows:
    limit = session.plan.recipe.data.eval_rows if what == "held-out" else None
    encoded = encoder.encode(read_rows(source, encoder.data, limit))
    tokens = sum(len(sequence.token_ids) for sequence in encoded.sequences)
    trained = sum(sequence.num_trained for sequence in encoded.sequences)
    cut = f", {encoded.num_truncated} truncated" if encoded.num_truncated else ""
    cut += f", {encoded.num_dropped} dropped" if encoded.num_dropped else ""
    if encoded.num_split:
        cut += f", {encoded.num_split:,} rows as {len(encoded.sequences):,} sequences in all, one per rewritten turn"
    cut += f", white space changed by the template in {encoded.num_respaced:,} rows" if encoded.num_respaced else ""
    session.say(f"{what}: {encoded.num_rows:,} rows, {tokens:,} tokens, {trained:,} trained{cut}")
    return encoded
