"""Values and gradients of the KL estimates against an exact divergence, every outcome enumerated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.algorithms.kl import k1, k2, k3, kl_penalty

POLICY = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64)
OLD = torch.tensor([0.1, -0.6, 0.5, 0.4, -0.2], dtype=torch.float64)
REFERENCE = torch.tensor([-0.5, 0.4, 0.2, 1.0, -1.1], dtype=torch.float64)
"""Logits over five outcomes, unequal enough that the two directions of the divergence differ by a third."""


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q), exact."""
    p, q = p_logits.log_softmax(0), q_logits.log_softmax(0)
    return (p.exp() * (p - q)).sum()


def finite_difference(function, at: Tensor, step: float = 1e-6) -> Tensor:
    directions = torch.eye(at.numel(), dtype=at.dtype) * step
    return torch.stack([(function(at + d) - function(at - d)) / (2 * step) for d in directions])


def expected_gradient(penalty, drawn_by: Tensor) -> Tensor:
    """The gradient by the policy's logits that a loss of `penalty` has on average over tokens from `drawn_by`."""
    logits = POLICY.clone().requires_grad_()
    probability = drawn_by.softmax(0)  # of drawing the outcome: no gradient flows through what was drawn
    (gradient,) = torch.autograd.grad((probability * penalty(logits.log_softmax(0))).sum(), logits)
    return gradient


def penalty_of(estimator):
    return lambda logprobs: kl_penalty(logprobs, OLD.log_softmax(0), REFERENCE.log_softmax(0), estimator)


@pytest.mark.parametrize("estimate", [k1, k3])
def test_k1_and_k3_average_to_the_exact_divergence(estimate):
    p, q = POLICY.log_softmax(0), REFERENCE.log_softmax(0)
    torch.testing.assert_close((p.exp() * estimate(q - p)).sum(), kl(POLICY, REFERENCE))


def test_k2_is_biased_but_right_to_second_order():
    p = POLICY.log_softmax(0)
    near = (POLICY + 1e-3 * REFERENCE).log_softmax(0)
    torch.testing.assert_close((p.exp() * k2(near - p)).sum(), kl(POLICY, near), rtol=1e-2, atol=0.0)
    far = (3 * REFERENCE).log_softmax(0)
    assert (p.exp() * k2(far - p)).sum() > 1.1 * kl(POLICY, far)


def test_k1_itself_in_a_loss_would_have_no_gradient():
    # Why the "k1" penalty is not simply k1.
    naive = expected_gradient(lambda logprobs: k1(REFERENCE.log_softmax(0) - logprobs), POLICY)
    torch.testing.assert_close(naive, torch.zeros_like(naive))


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_k1_and_k2_penalties_descend_the_divergence_on_policy(estimator):
    exact = finite_difference(lambda logits: kl(logits, REFERENCE), POLICY)
    torch.testing.assert_close(expected_gradient(penalty_of(estimator), POLICY), exact, rtol=1e-6, atol=1e-8)


def test_k3_penalty_descends_the_other_direction_on_policy():
    gradient = expected_gradient(penalty_of("k3"), POLICY)
    forward = finite_difference(lambda logits: kl(REFERENCE, logits), POLICY)
    reverse = finite_difference(lambda logits: kl(logits, REFERENCE), POLICY)
    torch.testing.assert_close(gradient, forward, rtol=1e-6, atol=1e-8)
    assert (gradient - reverse).abs().max() > 0.05


def test_corrected_k3_penalty_descends_the_divergence_off_policy():
    exact = finite_difference(lambda logits: kl(logits, REFERENCE), POLICY)
    gradient = expected_gradient(penalty_of("k3_corrected"), OLD)
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("estimator", "value"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5)])
def test_penalty_has_the_value_of_its_estimate(estimator, value):
    logprobs = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    penalty = kl_penalty(logprobs, logprobs.detach(), torch.tensor([-1.5], dtype=torch.float64), estimator)
    assert penalty.item() == pytest.approx(value)


@pytest.mark.parametrize("log_ratio", [1e-1, 1e-3, 1e-5, 1e-7, -1e-7, -1e-3, -1e-1])
def test_k3_keeps_its_digits_near_zero(log_ratio):
    d = torch.tensor([log_ratio], dtype=torch.float32, requires_grad=True)
    value = k3(d)
    value.sum().backward()
    exact = d.item()
    series = exact**2 / 2 + exact**3 / 6 + exact**4 / 24 + exact**5 / 120
    assert value.item() == pytest.approx(series, rel=1e-5)
    assert d.grad.item() == pytest.approx(math.expm1(exact), rel=1e-5)


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0, 88.0, -88.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_neither_overflows_nor_gives_nan(log_ratio, dtype):
    d = torch.tensor([log_ratio], dtype=dtype, requires_grad=True)
    value = k3(d)
    value.sum().backward()
    assert value.isfinite().all()
    assert value.item() >= 0
    assert d.grad.isfinite().all()


def test_k3_is_never_negative():
    d = torch.linspace(-30, 30, 10001)
    assert (k3(d) >= 0).all()
    assert k3(torch.zeros(1)).item() == 0.0
