"""The invariants that every policy loss keeps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.algorithms import (
    ALGORITHMS,
    PRESETS,
    LossTerms,
    PolicyTokens,
    ResolvedAlgorithm,
    denominator,
    policy_terms,
    sampler_kl,
    sft,
    token_weights,
    truncated_weights,
)
from trainer.config.rft_sections import AlgorithmSettings
from trainer.planning.algorithm import algorithm_values, resolve_algorithm

LENGTHS = (3, 1, 5, 2)
MAX_COMPLETION_TOKENS = 8

# Bounds wide enough for `make_tokens` to have clipped and free tokens under each algorithm.
ALL_PRESETS = [
    replace(preset, clip_low=0.2, clip_high=0.3, kl_coef=0.1, kl_estimator=estimator, normalizer=normalizer)
    for preset in (PRESETS["grpo"], PRESETS["gspo"], PRESETS["cispo"])
    for estimator in ("k1", "k2", "k3", "k3_corrected")
    for normalizer in ("token", "sequence", "constant")
]


def describe(preset: ResolvedAlgorithm) -> str:
    return f"{preset.loss}-{preset.kl_estimator}-{preset.normalizer}"


def make_tokens(lengths=LENGTHS, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PolicyTokens:
    """A batch off policy, with advantages of both signs and a reference that is elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    num_tokens = sum(lengths)
    logprobs = -noise(num_tokens).abs() - 0.1
    sequence_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return PolicyTokens(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() + 0.4 * noise(num_tokens),
        ref_logprobs=logprobs.detach() + 0.7 * noise(num_tokens),
        advantages=noise(len(lengths))[sequence_ids],
        sequence_ids=sequence_ids,
        sampler_weights=(0.2 * noise(num_tokens)).exp(),
    )


def one_token(*, ratio: float, advantage: float, logprob: float = -2.0) -> PolicyTokens:
    logprobs = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    return PolicyTokens(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() - math.log(ratio),
        ref_logprobs=logprobs.detach(),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        sequence_ids=torch.tensor([0]),
    )


def terms_of(
    name: Any, tokens: PolicyTokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: Any
) -> LossTerms:
    """Loss and metrics of a formula with these numbers."""
    preset: ResolvedAlgorithm = PRESETS[name]
    algorithm = replace(preset, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef, kl_estimator=kl_estimator)
    return policy_terms(tokens, algorithm)


def gradient(loss: Tensor, logprobs: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss.sum(), logprobs)
    return result


def select(tokens: PolicyTokens, order: Tensor, sequence_ids: Tensor) -> PolicyTokens:
    """The tokens at `order`, with new sequence ids."""
    assert tokens.sampler_weights is not None
    return PolicyTokens(
        logprobs=tokens.logprobs[order],
        old_logprobs=tokens.old_logprobs[order],
        ref_logprobs=tokens.ref_logprobs[order],
        advantages=tokens.advantages[order],
        sequence_ids=sequence_ids,
        sampler_weights=tokens.sampler_weights[order],
    )


def parts_of_loss(tokens: PolicyTokens, preset: ResolvedAlgorithm) -> tuple[Tensor, int]:
    """Numerator and denominator of the loss of a micro-batch."""
    terms = policy_terms(tokens, preset)
    part = denominator(
        preset.normalizer,
        num_tokens=tokens.logprobs.numel(),
        num_sequences=tokens.sequence_ids.unique().numel(),
        max_completion_tokens=MAX_COMPLETION_TOKENS,
    )
    return (token_weights(preset.normalizer, tokens.sequence_ids) * terms.loss).sum(), part


def gradient_of_batches(batches: list[PolicyTokens], preset: ResolvedAlgorithm, logprobs: Tensor) -> Tensor:
    sums, parts = zip(*(parts_of_loss(batch, preset) for batch in batches), strict=True)
    return gradient(sum(sums) / sum(parts), logprobs)


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=describe)
def test_the_batch_of_these_tests_is_partly_clipped(preset):
    assert 0 < policy_terms(make_tokens(), preset).metrics["clip_frac"].mean() < 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_gradient_is_minus_the_advantage(name):
    tokens = make_tokens()
    tokens = replace(tokens, old_logprobs=tokens.logprobs.detach(), sampler_weights=None)
    terms = terms_of(name, tokens, clip_low=0.2, clip_high=0.3, kl_coef=0.0, kl_estimator="k3")
    torch.testing.assert_close(gradient(terms.loss, tokens.logprobs), -tokens.advantages)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, +1.0, -1.2, 0.0),  # good and already likelier: clipped above, no gradient
        (0.5, +1.0, -0.5, -0.5),  # good but less likely: not clipped
        (1.5, -1.0, +1.5, +1.5),  # bad and likelier: not clipped
        (0.5, -1.0, +0.8, 0.0),  # bad and already less likely: clipped below, no gradient
        (1.1, +2.0, -2.2, -2.2),  # inside the bounds
        (1.5, 0.0, 0.0, 0.0),  # no signal, and not counted as clipped
    ],
)
def test_clip_is_pessimistic(name, ratio, advantage, loss, slope):
    tokens = one_token(ratio=ratio, advantage=advantage)
    terms = terms_of(name, tokens, clip_low=0.2, clip_high=0.2, kl_coef=0.0, kl_estimator="k3")
    assert terms.loss.item() == pytest.approx(loss)
    assert gradient(terms.loss, tokens.logprobs).item() == pytest.approx(slope)
    assert bool(terms.metrics["clip_frac"]) is (slope == 0.0 and advantage != 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [
        (1.5, +1.0, 1.2),  # weighs less than its ratio, and still learns
        (1.5, -1.0, 1.2),  # whatever the sign
        (0.5, +1.0, 0.8),
        (1.1, +2.0, 1.1),  # inside the bounds
    ],
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(ratio, advantage, weight):
    tokens = one_token(ratio=ratio, advantage=advantage, logprob=-2.0)
    terms = terms_of("cispo", tokens, clip_low=0.2, clip_high=0.2, kl_coef=0.0, kl_estimator="k3")
    assert terms.loss.item() == pytest.approx(2.0 * weight * advantage)
    assert gradient(terms.loss, tokens.logprobs).item() == pytest.approx(-weight * advantage)
    assert bool(terms.metrics["clip_frac"]) is (weight != ratio)


def test_grpo_bounds_are_separate():
    clip: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0, "kl_estimator": "k3"}
    assert terms_of("grpo", one_token(ratio=1.5, advantage=1.0), **clip).loss.item() == pytest.approx(-1.28)
    assert terms_of("grpo", one_token(ratio=0.5, advantage=-1.0), **clip).loss.item() == pytest.approx(0.8)


def test_gspo_ratio_is_the_geometric_mean_over_the_completion():
    logprobs = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([1.1, 1.2, 0.5], dtype=torch.float64)  # two tokens of one completion, one of another
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() - ratios.log(),
        ref_logprobs=logprobs.detach(),
        advantages=torch.ones(3, dtype=torch.float64),
        sequence_ids=torch.tensor([0, 0, 1]),
    )
    terms = terms_of("gspo", tokens, clip_low=0.9, clip_high=0.9, kl_coef=0.0, kl_estimator="k3")
    mean = math.sqrt(1.1 * 1.2)
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([-mean, -mean, -0.5], dtype=torch.float64))


def test_gspo_has_the_gradient_of_the_sequence_form():
    tokens = replace(make_tokens(), sampler_weights=None)
    terms = terms_of("gspo", tokens, clip_low=0.2, clip_high=0.3, kl_coef=0.0, kl_estimator="k3")
    token_form = token_weights("sequence", tokens.sequence_ids) * terms.loss

    log_ratios = (tokens.logprobs - tokens.old_logprobs).split(LENGTHS)
    ratio = torch.stack([log_ratio.mean() for log_ratio in log_ratios]).exp()
    advantages = torch.stack([part[0] for part in tokens.advantages.split(LENGTHS)])
    sequence_form = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)

    torch.testing.assert_close(token_form.sum(), sequence_form.sum())
    torch.testing.assert_close(gradient(token_form, tokens.logprobs), gradient(sequence_form, tokens.logprobs))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_flat_group_has_no_gradient_without_penalty(name):
    tokens = make_tokens()
    tokens = replace(tokens, advantages=torch.zeros_like(tokens.advantages))
    terms = terms_of(name, tokens, clip_low=0.2, clip_high=0.3, kl_coef=0.0, kl_estimator="k3")
    assert torch.count_nonzero(gradient(terms.loss, tokens.logprobs)) == 0


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=describe)
def test_order_of_completions_changes_no_gradient(preset):
    tokens = make_tokens()
    whole = gradient_of_batches([tokens], preset, tokens.logprobs)
    new_order = [2, 0, 3, 1]
    positions = torch.arange(sum(LENGTHS)).split(LENGTHS)
    order = torch.cat([positions[sequence] for sequence in new_order])
    lengths = torch.tensor([LENGTHS[sequence] for sequence in new_order])
    reordered = select(tokens, order, torch.arange(4).repeat_interleave(lengths))
    torch.testing.assert_close(gradient_of_batches([reordered], preset, tokens.logprobs), whole)


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=describe)
def test_micro_batches_change_no_gradient(preset):
    tokens = make_tokens()
    whole = gradient_of_batches([tokens], preset, tokens.logprobs)
    for cut in range(1, len(LENGTHS)):
        batches = []
        for start, stop in itertools.pairwise((0, cut, len(LENGTHS))):
            inside = (tokens.sequence_ids >= start) & (tokens.sequence_ids < stop)
            order = inside.nonzero().squeeze(1)
            batches.append(select(tokens, order, tokens.sequence_ids[order] - start))
        torch.testing.assert_close(gradient_of_batches(batches, preset, tokens.logprobs), whole)


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=describe)
@pytest.mark.parametrize(("old_shift", "ref_shift"), [(1e3, -1e3), (-1e3, 1e3), (1e3, 1e3), (-1e3, -1e3)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_far_apart_logprobs_neither_overflow_nor_give_nan(preset, old_shift, ref_shift, sign):
    tokens = make_tokens(dtype=torch.float32)
    tokens = replace(
        tokens,
        old_logprobs=tokens.logprobs.detach() + old_shift,
        ref_logprobs=tokens.logprobs.detach() + ref_shift,
        advantages=torch.full_like(tokens.advantages, sign),
    )
    terms = policy_terms(tokens, preset)
    assert terms.loss.isfinite().all()
    assert gradient(terms.loss, tokens.logprobs).isfinite().all()
    assert all(metric.isfinite().all() for metric in terms.metrics.values())


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=describe)
def test_a_call_without_tokens_has_a_zero_gradient(preset):
    # A rank with fewer micro-batches than the others still runs as many forwards.
    tokens = select(make_tokens(), torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))
    numerator, part = parts_of_loss(tokens, preset)
    assert (numerator.item(), part) == (0.0, 0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_metrics_are_the_contracts_estimates(name):
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    tokens = PolicyTokens(
        logprobs=logprobs,
        old_logprobs=torch.tensor([-1.5], dtype=torch.float64),  # d = logprobs - old_logprobs = 0.5
        ref_logprobs=torch.tensor([-1.2], dtype=torch.float64),  # d = ref_logprobs - logprobs = -0.2
        advantages=torch.ones(1, dtype=torch.float64),
        sequence_ids=torch.tensor([0]),
    )
    metrics = terms_of(name, tokens, clip_low=0.2, clip_high=0.2, kl_coef=0.0, kl_estimator="k3").metrics
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        {
            "ppo_kl": math.exp(0.5) - 1 - 0.5,
            "ppo_kl_k1": -0.5,
            "ref_kld": math.exp(-0.2) - 1 + 0.2,
            "ref_kld_k1": 0.2,
            "clip_frac": 1.0,
        }
    )
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_metrics_are_exactly_zero_where_the_policies_are_equal(name):
    tokens = make_tokens(dtype=torch.float32)
    same = tokens.logprobs.detach()
    tokens = replace(tokens, old_logprobs=same, ref_logprobs=same)
    metrics = terms_of(name, tokens, clip_low=0.2, clip_high=0.2, kl_coef=0.0, kl_estimator="k3").metrics
    assert all(torch.count_nonzero(metric) == 0 for metric in metrics.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_sampler_weights_scale_the_policy_part_and_not_the_penalty(name):
    tokens = make_tokens()
    numbers: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "kl_estimator": "k3"}

    def loss(weights: Tensor | None, kl_coef: float) -> Tensor:
        return terms_of(name, replace(tokens, sampler_weights=weights), kl_coef=kl_coef, **numbers).loss

    policy_part = loss(None, 0.0)
    penalty = loss(None, 0.5) - policy_part
    weights = torch.full_like(tokens.old_logprobs, 3.0)
    torch.testing.assert_close(loss(weights, 0.5), 3 * policy_part + penalty)


def test_tokens_of_unequal_shapes_are_refused():
    tokens = make_tokens()
    with pytest.raises(AssertionError):
        replace(tokens, advantages=tokens.advantages[:, None])  # would broadcast to [N, N]


def test_truncated_weights_are_old_over_sampler_up_to_the_cap():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.0 - math.log(1.5), -1.0 - math.log(3.0), -1.0 - 1e3])
    weights = truncated_weights(old, sampler, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.5, 2.0, 2.0]))
    assert weights.max().item() <= 2.0
    assert not weights.requires_grad


def test_sampler_kl_averages_to_the_exact_divergence():
    sampler = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    old = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (sampler * (sampler / old).log()).sum()
    torch.testing.assert_close((sampler * sampler_kl(old.log(), sampler.log())).sum(), exact)


@pytest.mark.parametrize(
    ("normalizer", "average"),
    [
        ("token", (3.0 + 3.0 + 6.0) / 3),  # DAPO: every token counts alike
        ("sequence", ((3.0 + 3.0) / 2 + 6.0) / 3),  # GRPO: every completion counts alike, the empty one too
        ("constant", (3.0 + 3.0 + 6.0) / (3 * 4)),  # Dr. GRPO: by the limit, not by the length
    ],
)
def test_normalizers_are_the_papers_averages(normalizer, average):
    terms = torch.tensor([3.0, 3.0, 6.0])
    sequence_ids = torch.tensor([0, 0, 2])  # completion 1 has no trained token
    part = denominator(normalizer, num_tokens=3, num_sequences=3, max_completion_tokens=4)
    assert (token_weights(normalizer, sequence_ids) * terms).sum().item() / part == pytest.approx(average)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_sequence_weights_of_a_completion_sum_to_one(lengths):
    sequence_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    weights = token_weights("sequence", sequence_ids)
    sums = torch.zeros(len(lengths)).index_add_(0, sequence_ids, weights)
    torch.testing.assert_close(sums, torch.ones(len(lengths)))


def test_sft_is_the_weighted_negative_log_likelihood():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    terms = sft(logprobs, torch.tensor([1.0, 0.0, 0.5]))
    assert isinstance(terms, LossTerms)
    assert terms.loss.tolist() == [1.0, 0.0, 1.5]
    assert gradient(terms.loss, logprobs).tolist() == [-1.0, 0.0, -0.5]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_a_formula_and_runs(name):
    preset = PRESETS[name]
    assert preset.loss in ALGORITHMS
    assert policy_terms(make_tokens(), preset).loss.isfinite().all()


def test_a_recipe_overrides_single_numbers_of_its_algorithm():
    given = AlgorithmSettings(name="dapo", clip_high=0.5, kl_coef=0.0)
    assert resolve_algorithm(given) == replace(PRESETS["dapo"], clip_high=0.5)
    assert resolve_algorithm(AlgorithmSettings(name="dapo", overlong="keep")).overlong == "keep"


@pytest.mark.parametrize("name", PRESETS)
def test_a_resolved_recipe_says_every_number_and_stays_resolved(name):
    resolved = resolve_algorithm(AlgorithmSettings(name=name))
    assert (resolved.clip_low, resolved.clip_high) == (PRESETS[name].clip_low, PRESETS[name].clip_high)
    assert resolved == PRESETS[name]
    assert resolve_algorithm(AlgorithmSettings.model_validate(algorithm_values(resolved))) == resolved
