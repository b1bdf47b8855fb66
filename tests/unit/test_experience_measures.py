"""What a step is measured against: the old policy, the reference, the sampler."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from groups import (
    CPU,
    WORLD,
    drawn,
    drawn_by,
    four_groups,
    group,
    make_learner,
    make_plan,
    minibatches,
    rollout,
    run_step,
)
from tiny import tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.errors import NumericalError
from trainer.model.policy import Reference, load_policy, score, warm_start
from trainer.planning.plan import RFTPlan
from trainer.training.learner import Learner
from trainer.training.policy_update import learn


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2", scale=6.0)


# --- old logprobs


def test_ppo_kl_is_0_on_the_first_minibatch_and_above_0_on_the_second(model_dir):
    plan = make_plan(minibatches_per_step=2, kl_coef=0.0)
    groups = four_groups()
    parts = minibatches(drawn(groups), plan, CPU)
    learner = make_learner(model_dir, plan)
    reference = Reference(learner.policy, "base", is_fresh=False)
    first = learn(make_learner(model_dir, plan), parts[:1], reference, plan, 0).metrics
    both = learn(learner, minibatches(drawn(groups), plan, CPU), reference, plan, 0).metrics
    assert (first["ppo_kl"], first["ppo_kl_k1"]) == (0.0, 0.0)
    assert both["ppo_kl"] > 1e-6
    assert learner.updates == 2


def test_old_logprobs_are_those_before_the_step(model_dir):
    plan = make_plan(minibatches_per_step=2, epochs_per_batch=2)
    learner = make_learner(model_dir, plan)
    parts = minibatches(drawn(four_groups()), plan, CPU)
    before = [[score(learner.policy, pack, 1.0) for pack in part.packs] for part in parts]
    learn(learner, parts, Reference(learner.policy, "base", is_fresh=False), plan, 0)
    for part, of_part in zip(parts, before, strict=True):
        for pack, wanted in zip(part.packs, of_part, strict=True):
            torch.testing.assert_close(pack.inputs.old_logprobs, wanted, rtol=0, atol=1e-5)
            moved = (score(learner.policy, pack, 1.0) - wanted).abs().max()
            assert moved > 1e-2  # so that old and new could not be mistaken for each other


def test_a_second_epoch_is_off_policy_and_tokens_are_counted_once(model_dir):
    plan, groups = make_plan(epochs_per_batch=2), four_groups()
    learner = make_learner(model_dir, plan)
    values = run_step(learner, plan, groups)
    assert values["ppo_kl"] > 1e-6
    assert values["tokens"] == 17 + 20 + 34 + 62
    assert learner.updates == 2


# --- the reference


def adapter_of(model_dir, path, plan: RFTPlan):
    """An adapter directory, as another run left it."""
    trained = make_learner(model_dir, plan)
    path.mkdir()
    trained.policy.save(path, trained.masters)
    return path


def first_kld(learner: Learner, plan: RFTPlan, kind: Any, *, is_fresh: bool) -> tuple[float, Reference]:
    reference = Reference(learner.policy, kind, is_fresh=is_fresh)
    return run_step(learner, plan, four_groups(), reference=reference)["ref_kld"], reference


@pytest.mark.parametrize("kind", ["initial", "base"])
def test_ref_kld_of_a_fresh_adapter_is_0_at_step_0_and_not_after(model_dir, kind):
    plan = make_plan()
    learner = make_learner(model_dir, plan, perturbed=False)
    kld, reference = first_kld(learner, plan, kind, is_fresh=True)
    assert kld == 0.0
    assert run_step(learner, plan, four_groups(), reference=reference)["ref_kld"] > 0


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_after_a_warm_start_initial_is_the_adapter_that_was_loaded_and_base_is_not(model_dir, tmp_path, compute_dtype):
    plan = make_plan()
    lora = LoraSettings(rank=4, warm_start=str(adapter_of(model_dir, tmp_path / "adapter", plan)))
    for kind, is_zero in (("initial", True), ("base", False)):
        policy = load_policy(ModelSettings(path=str(model_dir), compute_dtype=compute_dtype), lora, 0, CPU)
        learner = Learner(policy, WORLD)
        warm_start(lora, policy, learner.masters)
        learner.refresh()
        kld, reference = first_kld(learner, plan, kind, is_fresh=False)
        assert (kld == 0.0) is is_zero, (kind, kld)
        assert run_step(learner, plan, four_groups(), reference=reference)["ref_kld"] > 0


def test_the_reference_of_a_full_parameter_run_is_a_copy_of_its_beginning(model_dir):
    plan = make_plan(is_full=True)
    learner = make_learner(model_dir, plan, perturbed=False)
    kld, reference = first_kld(learner, plan, "initial", is_fresh=False)
    assert kld == 0.0
    untouched = make_learner(model_dir, plan, perturbed=False).policy
    (part,) = minibatches(drawn(four_groups()), plan, CPU)
    (pack,) = part.packs
    after = score(learner.policy, pack, 1.0)
    assert torch.equal(reference.logprobs(pack, 1.0), score(untouched, pack, 1.0))
    assert torch.equal(score(learner.policy, pack, 1.0), after)  # the policy is back in place
    assert not torch.equal(after, score(untouched, pack, 1.0))


def test_the_penalty_pulls_towards_the_reference(model_dir):
    plan = make_plan(kl_coef=1.0)
    flat = [replace(each, rollouts=tuple(replace(r, reward=0.5) for r in each.rollouts)) for each in four_groups()]
    learner = make_learner(model_dir, plan)
    reference = Reference(learner.policy, "base", is_fresh=False)
    distances = [run_step(learner, plan, flat, reference=reference)["ref_kld"] for _ in range(4)]
    assert distances == sorted(distances, reverse=True)


# --- the sampler


@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_mismatch_cap_weighs_the_loss_by_the_capped_ratio(model_dir, cap):
    settings: dict[str, Any] = {"kl_coef": 0.0, "normalizer": "token", "advantage": "mean_only"}
    plan = make_plan(mismatch_cap=cap, **settings)
    learner = make_learner(model_dir, plan)
    groups = four_groups()
    (part,) = minibatches(drawn(groups), plan, CPU)
    raw = torch.cat([score(learner.policy, pack, 1.0) - pack.inputs.sampler_logprobs for pack in part.packs])
    advantages = torch.cat([pack.inputs.advantages for pack in part.packs])
    weights = raw.exp().clamp(max=cap)
    assert weights.min() < 0.9 * cap
    assert (weights == cap).any()
    expected = -(weights * advantages).sum().item() / part.num_trained
    assert run_step(learner, plan, groups)["loss"] == pytest.approx(expected, rel=1e-4)
    without = run_step(make_learner(model_dir, plan), make_plan(**settings), groups)
    assert without["loss"] == pytest.approx(-advantages.sum().item() / part.num_trained, abs=1e-6)


def test_a_sampler_with_other_weights_stops_the_run_and_updates_nothing(model_dir):
    plan = make_plan(max_sampler_kl=1e-3)
    learner = make_learner(model_dir, plan)
    stale = make_learner(model_dir, plan, perturbed=False).policy
    before = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
    with pytest.raises(NumericalError, match=r"sampler_kl is \S+, more than rollout.max_sampler_kl \(0.001\)"):
        run_step(learner, plan, drawn_by(stale, four_groups()))
    assert learner.updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_tensors().items())


def test_a_sampler_with_the_policys_weights_goes_on(model_dir):
    plan = make_plan(max_sampler_kl=1e-6)
    learner = make_learner(model_dir, plan)
    assert run_step(learner, plan, drawn_by(learner.policy, four_groups()))["sampler_kl"] < 1e-9


def test_a_sampler_whose_logprobs_are_not_numbers_stops_the_run(model_dir):
    plan = make_plan(max_sampler_kl=1e9)
    learner = make_learner(model_dir, plan)
    broken = replace(rollout(5, 1.0), sampler_logprobs=(math.nan,) * 5)
    with pytest.raises(NumericalError, match="sampler_kl is nan"):
        run_step(learner, plan, [group(broken, rollout(9, 0.0))])


def test_logprobs_are_of_the_sampling_temperature(model_dir):
    hot, cold = make_plan(temperature=0.5, max_sampler_kl=1e-6), make_plan(max_sampler_kl=1e-6)
    learner = make_learner(model_dir, hot)
    groups = drawn_by(learner.policy, four_groups(), temperature=0.5)
    (part,) = minibatches(drawn(groups), hot, CPU)
    pack = part.packs[0]
    half, one = (score(learner.policy, pack, temperature) for temperature in (0.5, 1.0))
    assert (half - one).abs().max() > 0.1
    expected = run_step(make_learner(model_dir, hot), hot, groups)
    assert expected["sampler_kl"] < 1e-9
    with pytest.raises(NumericalError, match="sampler_kl"):
        run_step(learner, cold, groups)
    reference = Reference(learner.policy, "base", is_fresh=False)
    d = (reference.logprobs(pack, 0.5) - half).double()
    assert expected["ref_kld"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-4)
