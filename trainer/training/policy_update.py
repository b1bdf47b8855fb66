"""From the scored groups of a step to packed minibatches and their updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from trainer.algorithms import ResolvedAlgorithm, denominator
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.errors import NumericalError
from trainer.model.batch import Batch, Tree, unit_batches
from trainer.model.policy import Reference, score
from trainer.model.trees import grow_forks, grow_trees
from trainer.planning.plan import RFTPlan
from trainer.training.learner import Learner, PackResult, Update
from trainer.training.losses import PolicyLoss
from trainer.training.rollouts import StepRollouts
from trainer.training.schedule import adam_params
from trainer.types import Group, Rollout


@final
@dataclass
class Minibatch:
    """The data of one optimizer update, on this rank."""

    packs: list[Batch]
    denominator: float
    """This rank's part of the divisor of the summed loss."""

    @property
    def num_trained(self) -> int:
        """Trained tokens on this rank."""
        return sum(pack.num_trained for pack in self.packs)


def minibatches(drawn: StepRollouts, plan: RFTPlan, device: torch.device, budget: int | None = None) -> list[Minibatch]:
    """Pack a step's scored rollouts into minibatches.

    Args:
        drawn: this rank's.
        plan: algorithm, number of minibatches, token budget.
        device: where the packs go.
        budget: maximum tokens of a pack of several sequences; None: the shape's.
    """
    budget = plan.shape.micro_batch_tokens if budget is None else budget
    algorithm = plan.algorithm
    result = []
    for part in _split(drawn, algorithm.minibatches_per_step):
        packs = _packs(
            [_sequences(group, algorithm, number) for number, group in enumerate(part)], algorithm, budget, device
        )
        divisor = denominator(
            algorithm.normalizer,
            num_tokens=sum(pack.num_trained for pack in packs),
            num_sequences=sum(len(group.scored) for group in part),
            max_completion_tokens=plan.recipe.rollout.drawn_token_limit,
        )
        result.append(Minibatch(packs, float(divisor)))
    return result


def learn(learner: Learner, parts: list[Minibatch], reference: Reference, plan: RFTPlan, step: int) -> Update:
    """Make the step's updates; returns the means of their metrics.

    A minibatch without a trained token on any rank (all its completions failed or are masked) makes no update. A step
    of such minibatches changes nothing and has no means.

    Args:
        learner: trains the policy.
        parts: the step's minibatches, from `minibatches`; their packs get the logprobs measured here.
        reference: what `ref_kld` is measured against.
        plan: algorithm and optimizer.
        step: steps made so far.

    Raises:
        NumericalError: the sampler's weights were not the policy's; nothing was updated.
    """
    algorithm, rollout = plan.algorithm, plan.recipe.rollout
    loss = PolicyLoss(algorithm)
    temperature = rollout.temperature
    adam = adam_params(plan.recipe.optimizer, step, plan.steps)
    num_trained = learner.world.sum_of([float(part.num_trained) for part in parts])
    parts = [part for part, tokens in zip(parts, num_trained, strict=True) if tokens]
    if not parts:
        return Update({"tokens": 0.0, "learning_rate": adam.learning_rate})
    _add_dummies(parts, learner.world)
    _score_before(parts, learner, reference, temperature)
    updates = []
    for epoch in range(algorithm.epochs_per_batch):
        for index, part in enumerate(parts):
            results = learner.accumulate(part.packs, loss, temperature=temperature, with_entropy=True)
            if epoch == index == 0:
                _refuse_stale_sampler(results, learner.world, rollout.max_sampler_kl)
                _keep_old_logprobs(part, results)
            updates.append(learner.optim_step(adam, part.denominator))
    return _mean(updates, algorithm.epochs_per_batch)


def _add_dummies(parts: list[Minibatch], world: World) -> None:
    """With a sharded base, give all ranks the same number of passes, forward and backward."""
    for part, count in zip(parts, world.num_dummies([len(part.packs) for part in parts]), strict=True):
        part.packs += [Batch.dummy(world.device) for _ in range(count)]
        if world.mesh is not None:
            part.packs = [replace(pack, is_forward_only=False) for pack in part.packs]


def _score_before(parts: list[Minibatch], learner: Learner, reference: Reference, temperature: float) -> None:
    """Add reference logprobs to all packs, and old logprobs to those of all minibatches but the first.

    The old logprobs of the first minibatch are those of its own first pass, see `PolicyLoss`.
    """
    for number, part in enumerate(parts):
        for index, pack in enumerate(part.packs):
            if learner.must_abandon():
                break
            ref = reference.logprobs(pack, temperature)
            old = score(learner.policy, pack, temperature) if number > 0 else None
            part.packs[index] = pack.with_logprobs(ref=ref, old=old)


def _keep_old_logprobs(part: Minibatch, results: Sequence[PackResult]) -> None:
    """Keep the logprobs of the first pass over the first minibatch, for later epochs.

    An abandoned update has fewer results than packs; its packs are not used again.
    """
    part.packs = [pack.with_logprobs(old=result.logprobs) for pack, result in zip(part.packs, results, strict=False)]


def _refuse_stale_sampler(results: Sequence[PackResult], world: World, limit: float) -> None:
    total, tokens = world.sum_of(
        [sum(result.sums.get(name, 0.0) for result in results) for name in ("sampler_kl", "tokens")]
    )
    divergence = total / tokens if tokens else 0.0
    if not divergence <= limit:
        raise NumericalError(
            f"sampler_kl is {divergence:.3g}, more than rollout.max_sampler_kl ({limit:g}): the sampler drew from "
            "other weights than the policy's (a stale or unloaded adapter?). Nothing was updated."
        )


def _split(drawn: StepRollouts, num_parts: int) -> list[list[Group]]:
    """The groups of each minibatch on this rank.

    Groups are dealt round-robin, rotating the start each round. The minibatch of a group depends on its position in the
    step alone, so the number of ranks changes no minibatch, and each rank has about the same share of each.
    With 2 minibatches, the positions 0 to 3 go to the minibatches 0, 1, 1, 0.
    """
    parts: list[list[Group]] = [[] for _ in range(num_parts)]
    for group, position in zip(drawn.groups, drawn.positions, strict=True):
        parts[(position + position // num_parts) % num_parts].append(group)
    return parts


def _packs(
    groups: Sequence[Sequence[TokenSequence]], algorithm: ResolvedAlgorithm, budget: int, device: torch.device
) -> list[Batch]:
    """Pack the completions of each prompt behind one copy of it.

    Zero-advantage groups are packed separately and run without backward, unless a KL penalty gives them a gradient.
    """
    trained: list[list[Tree]] = []
    forward_only: list[list[Tree]] = []
    for sequences in groups:
        if sequences:
            has_gradient = algorithm.kl_coef != 0 or any(any(each.inputs.advantages) for each in sequences)
            (trained if has_gradient else forward_only).extend(_units(sequences, budget))
    packs = [Batch.pack_trees(trees, device) for trees in unit_batches(trained, budget)]
    return packs + [
        replace(Batch.pack_trees(trees, device), is_forward_only=True) for trees in unit_batches(forward_only, budget)
    ]


def _units(sequences: Sequence[TokenSequence], budget: int) -> list[list[Tree]]:
    """Trees that must stay in one pack: one each, or those of a rollout with several sequences.

    Normalizers and GSPO count tokens of whole rollouts, so a rollout is never split.
    """
    split = {each.owner for each in sequences if each.owner is not None}
    alone = [each for each in sequences if each.owner is None]
    units = [[tree] for tree in grow_trees(alone, budget)] if alone else []
    return units + [grow_forks([each for each in sequences if each.owner == owner], budget) for owner in sorted(split)]


def _sequences(group: Group, algorithm: ResolvedAlgorithm, number: int) -> list[TokenSequence]:
    """The token sequences of a group that are trained on: of rollouts scored, and not masked for their length."""
    return [
        sequence
        for index, rollout in enumerate(group.rollouts)
        if rollout.advantage is not None and not (algorithm.overlong == "mask" and rollout.finish_reason == "length")
        for sequence in _sequences_of(rollout, rollout.advantage, str(group.row), (number, index))
    ]


def _sequences_of(rollout: Rollout, advantage: float, source: str, owner: tuple[int, int]) -> list[TokenSequence]:
    drawn = rollout.sequences
    return [
        TokenSequence(
            each.token_ids,
            each.loss_mask,
            TokenInputs((), (advantage,) * len(each.sampler_logprobs), each.sampler_logprobs),
            source,
            owner if len(drawn) > 1 else None,
        )
        for each in drawn
    ]


def _mean(updates: Sequence[Update], num_epochs: int) -> Update:
    """Means over updates, weighted by tokens; `tokens` are those of one epoch. Skipped updates are left out."""
    if len(updates) == 1:
        return updates[0]
    metrics = [update.metrics for update in updates]
    tokens = sum(each["tokens"] for each in metrics)
    made = [each for each in metrics if "skipped" not in each]
    weight = sum(each["tokens"] for each in made)
    names = made[0] if made else ("learning_rate",)
    means = {name: sum(each[name] * each["tokens"] for each in made or metrics) / (weight or tokens) for name in names}
    skipped = {"skipped": float(len(metrics) - len(made))} if len(made) < len(metrics) else {}
    rows = tuple(row for update in updates for row in update.skipped_rows)
    return Update(means | {"tokens": tokens / num_epochs} | skipped, rows)
