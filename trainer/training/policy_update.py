"""From scored groups to packed minibatches, and the loss over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch

from trainer.algorithms import (
    PolicyTerms,
    PolicyTokens,
    Preset,
    denominator,
    policy_terms,
    sampler_kl,
    token_weights,
    truncated_weights,
)
from trainer.config.presets import merge_preset
from trainer.config.recipe import AlgorithmSettings, RolloutSettings
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.errors import NumericalError
from trainer.model.batch import Batch, Tree, grow_trees, tree_batches
from trainer.model.policy import Policy, Reference, Scores
from trainer.planning.plan import Plan
from trainer.training.learner import Learner
from trainer.training.rollouts import StepRollouts
from trainer.training.schedule import learning_rate
from trainer.types import Group, Rollout

METRICS: Final = ("ppo_kl", "ppo_kl_k1", "ref_kld", "ref_kld_k1", "clip_frac", "sampler_kl", "entropy")


@final
@dataclass
class Minibatch:
    """What one optimizer update learns from, on this rank."""

    packs: list[Batch]
    denominator: float
    """This rank's part of what the summed loss is divided by."""

    @property
    def num_trained(self) -> int:
        """Trained tokens on this rank."""
        return sum(pack.num_trained for pack in self.packs)


def minibatches(drawn: StepRollouts, plan: Plan, device: torch.device) -> list[Minibatch]:
    """Pack a step's scored rollouts into minibatches.

    Args:
        drawn: this rank's.
        plan: algorithm, number of minibatches, token budget.
        device: where the packs go.
    """
    settings, rollout = _settings(plan)
    preset = merge_preset(settings)
    found = []
    for part in _split(drawn, settings.minibatches_per_step):
        packs = _packs([_sequences(group, preset) for group in part], plan, device)
        divisor = denominator(
            preset.normalizer,
            num_tokens=sum(pack.num_trained for pack in packs),
            num_sequences=sum(len(group.scored) for group in part),
            max_completion_tokens=rollout.max_completion_tokens,
        )
        found.append(Minibatch(packs, float(divisor)))
    return found


def learn(learner: Learner, parts: list[Minibatch], reference: Reference, plan: Plan, step: int) -> dict[str, float]:
    """Make the step's updates; returns means over them.

    A minibatch without a trained token on any rank makes no update: all its completions failed or are masked. A step
    of such minibatches has no means, and changes nothing.

    Args:
        learner: whose policy learns.
        parts: the step's minibatches, from `minibatches`.
        reference: what `ref_kld` is measured against.
        plan: algorithm and optimizer.
        step: steps made so far.

    Raises:
        NumericalError: the sampler drew from other weights than the policy's; nothing was updated by it.
    """
    settings, rollout = _settings(plan)
    loss = PolicyLoss(merge_preset(settings), settings.mismatch_cap)
    temperature = rollout.temperature
    rate = learning_rate(plan.recipe.optimizer, step, plan.steps)
    num_trained = learner.world.sum_of([float(part.num_trained) for part in parts])
    parts = [part for part, tokens in zip(parts, num_trained, strict=True) if tokens]
    if not parts:
        return {"tokens": 0.0, "learning_rate": rate}
    _even_out(parts, learner.world)
    is_on_policy = settings.epochs_per_batch * len(parts) == 1
    _score_before(parts, learner, reference, temperature)
    updates = []
    for epoch in range(settings.epochs_per_batch):
        for number, part in enumerate(parts):
            learner.policy.train()
            for index, pack in enumerate(part.packs):
                learner.forward_backward(pack, loss, temperature=temperature, with_entropy=True)
                if not is_on_policy and "old_logprobs" not in pack.inputs:
                    part.packs[index] = replace(pack, inputs={**pack.inputs, "old_logprobs": loss.last_logprobs})
            learner.policy.eval()
            if epoch == 0 and number == 0:
                _refuse_stale_sampler(learner, rollout.max_sampler_kl)
            updates.append(learner.optim_step(rate, part.denominator, METRICS))
    return _means(updates, settings.epochs_per_batch)


def _even_out(parts: list[Minibatch], world: World) -> None:
    """Where ranks gather a sharded base together, all run the same passes, forward and backward."""
    for part, lacking in zip(parts, world.fillers([len(part.packs) for part in parts]), strict=True):
        part.packs += [Batch.filler(world.device) for _ in range(lacking)]
        if world.mesh is not None:
            part.packs = [replace(pack, is_still=False) for pack in part.packs]


def _score_before(parts: list[Minibatch], learner: Learner, reference: Reference, temperature: float) -> None:
    """Add what is measured before an update: the reference, and the old policy of all but the first minibatch."""
    for number, part in enumerate(parts):
        for index, pack in enumerate(part.packs):
            if learner.must_abandon():
                break
            extra = {"ref_logprobs": reference.logprobs(pack, temperature)}
            if number > 0:  # the first minibatch is its own old policy
                extra["old_logprobs"] = score(learner.policy, pack, temperature)
            part.packs[index] = replace(pack, inputs={**pack.inputs, **extra})


@final
class PolicyLoss:
    """The algorithm's loss over a pack that carries advantages, reference and old logprobs."""

    def __init__(self, preset: Preset, mismatch_cap: float | None) -> None:
        """Fix algorithm and correction."""
        self.preset, self.mismatch_cap = preset, mismatch_cap
        self.last_logprobs = torch.empty(0)
        """Of the pack just scored, detached: a pack without old logprobs is its own old policy."""

    def __call__(self, scores: Scores, batch: Batch) -> PolicyTerms:
        """Unreduced terms, weighted so that their sum over the denominator is the paper's average."""
        self.last_logprobs = scores.logprobs.detach()
        old = batch.inputs.get("old_logprobs", self.last_logprobs)
        sampler = batch.inputs["sampler_logprobs"]
        correction = None
        if self.mismatch_cap is not None:
            correction = truncated_weights(old, sampler, cap=self.mismatch_cap)
        tokens = PolicyTokens(
            logprobs=scores.logprobs,
            old_logprobs=old,
            ref_logprobs=batch.inputs["ref_logprobs"],
            advantages=batch.inputs["advantages"],
            sequence_ids=batch.sequence_ids,
            sampler_weights=correction,
        )
        terms = policy_terms(tokens, self.preset)
        weights = token_weights(self.preset.normalizer, batch.sequence_ids)
        return PolicyTerms(terms.loss * weights, {**terms.metrics, "sampler_kl": sampler_kl(old, sampler)})


@torch.no_grad()
def score(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """[N] logprobs of a pack as the policy is now."""
    policy.eval()
    return policy(batch, temperature=temperature).logprobs


def _settings(plan: Plan) -> tuple[AlgorithmSettings, RolloutSettings]:
    algorithm, rollout = plan.recipe.algorithm, plan.recipe.rollout
    assert algorithm is not None
    assert rollout is not None
    return algorithm, rollout


def _split(drawn: StepRollouts, parts: int) -> list[list[Group]]:
    """The groups of each minibatch on this rank.

    Of every so many groups in a row each minibatch gets one, in an order that turns by one from row to row: a function
    of the position alone, so that ranks change no minibatch, and one that gives each rank about the same share of each.
    """
    found: list[list[Group]] = [[] for _ in range(parts)]
    for group, position in zip(drawn.groups, drawn.positions, strict=True):
        found[(position + position // parts) % parts].append(group)
    return found


def _packs(groups: Sequence[Sequence[TokenSequence]], plan: Plan, device: torch.device) -> list[Batch]:
    """Completions of a prompt behind one copy of it; those that teach nothing are measured in packs of their own."""
    settings, budget = merge_preset(_settings(plan)[0]), plan.shape.micro_batch_tokens
    teaching: list[Tree] = []
    still: list[Tree] = []
    for sequences in groups:
        if sequences:
            is_still = settings.kl_coef == 0 and not any(any(each.inputs["advantages"]) for each in sequences)
            (still if is_still else teaching).extend(grow_trees(sequences, budget))
    packs = [Batch.pack_trees(chosen, device) for chosen in tree_batches(teaching, budget)]
    return packs + [replace(Batch.pack_trees(chosen, device), is_still=True) for chosen in tree_batches(still, budget)]


def _sequences(group: Group, preset: Preset) -> list[TokenSequence]:
    return [
        _sequence(rollout, rollout.advantage, str(group.row))
        for rollout in group.rollouts
        if rollout.advantage is not None and not (preset.overlong == "mask" and rollout.finish_reason == "length")
    ]


def _sequence(rollout: Rollout, advantage: float, where: str) -> TokenSequence:
    inputs = {"advantages": (advantage,) * rollout.num_drawn, "sampler_logprobs": rollout.sampler_logprobs}
    return TokenSequence(rollout.token_ids, rollout.loss_mask, inputs, where)


def _refuse_stale_sampler(learner: Learner, budget: float) -> None:
    divergence = learner.mean_so_far("sampler_kl")
    if not divergence <= budget:
        raise NumericalError(
            f"sampler_kl is {divergence:.3g}, more than rollout.max_sampler_kl ({budget:g}): the sampler drew from "
            "other weights than the policy's (a stale or unloaded adapter?). Nothing was updated."
        )


def _means(updates: Sequence[dict[str, float]], num_epochs: int) -> dict[str, float]:
    """Means over updates, weighted by their tokens; `tokens` are those of one pass. Skipped updates have no means."""
    if len(updates) == 1:
        return updates[0]
    tokens = sum(update["tokens"] for update in updates)
    made = [update for update in updates if "skipped" not in update]
    weight = sum(update["tokens"] for update in made)
    names = made[0] if made else ("learning_rate",)
    means = {
        name: sum(update[name] * update["tokens"] for update in made or updates) / (weight or tokens) for name in names
    }
    skipped = {"skipped": float(len(updates) - len(made))} if len(made) < len(updates) else {}
    return means | {"tokens": tokens / num_epochs} | skipped
