"""From groups to updates: what each token carries, and what the sum is divided by."""

from __future__ import annotations

import pytest
import torch
from groups import (
    CPU,
    LIMIT,
    PROMPT,
    drawn,
    four_groups,
    group,
    make_learner,
    make_plan,
    minibatches,
    rollout,
    run_step,
)
from tiny import tiny_model_dir

from trainer.model.batch import Batch
from trainer.planning.plan import RFTPlan
from trainer.training.rollouts import StepRollouts
from trainer.types import Group


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2", scale=6.0)


def gradient_of(model_dir, plan: RFTPlan, groups: list[Group]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of one update, read from AdamW's first moment, which is a tenth of it after the first step."""
    learner = make_learner(model_dir, plan)
    values = run_step(learner, plan, groups)
    moments = {name: 10 * learner.optimizer.made.state[master]["exp_avg"] for name, master in learner.masters.items()}
    return moments, values


def assert_same(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        assert (gradient - other[name]).abs().max() <= tolerance * gradient.abs().max(), name


def tokens_of(pack: Batch, name: str) -> dict[int, list[float]]:
    """A pack's values by the length of the completion that they are of; all lengths here differ."""
    found: dict[int, list[float]] = {}
    for owner in range(pack.num_sequences):
        values = getattr(pack.inputs, name)[pack.sequence_ids == owner].tolist()
        found[len(values)] = values
    return found


# --- what each token carries


def test_advantages_land_on_the_tokens_of_their_rollout_and_failures_are_left_out():
    plan = make_plan(advantage="mean_only")
    (part,) = minibatches(
        drawn([group(rollout(5, 1.0), rollout(9, 0.0), rollout(3, 0.5), rollout(7, None))]), plan, CPU
    )
    (pack,) = part.packs
    assert tokens_of(pack, "advantages") == {5: [0.5] * 5, 9: [-0.5] * 9, 3: [0.0] * 3}  # the mean of three is 0.5
    assert pack.num_trained == 17
    for item in (rollout(5, 1.0), rollout(9, 0.0)):
        length = len(item.token_ids) - len(PROMPT)
        assert tokens_of(pack, "sampler_logprobs")[length] == pytest.approx(item.sampler_logprobs)


def test_only_drawn_tokens_are_trained_and_each_group_is_judged_by_itself():
    plan = make_plan(advantage="mean_only")
    groups = [group(rollout(2, 1.0), rollout(3, 0.0)), group(rollout(4, 9.0), rollout(5, 7.0), index=1)]
    (part,) = minibatches(drawn(groups), plan, CPU)
    (pack,) = part.packs
    assert {length: values[0] for length, values in tokens_of(pack, "advantages").items()} == {
        2: 0.5, 3: -0.5, 4: 1.0, 5: -1.0
    }  # fmt: skip
    targets = [token for item in (5, 4, 3, 2) for token in rollout(item, None).token_ids[len(PROMPT) :]]
    assert pack.targets.tolist() == targets  # the longest first


def test_a_masked_completion_counts_in_its_group_and_is_not_trained_on():
    plan = make_plan(advantage="mean_only", overlong="mask", normalizer="sequence")
    (part,) = minibatches(drawn([group(rollout(5, 1.0), rollout(LIMIT, 0.0, "length"))]), plan, CPU)
    assert tokens_of(part.packs[0], "advantages") == {5: [0.5] * 5}
    assert part.denominator == 2


@pytest.mark.parametrize(
    ("normalizer", "overlong", "denominators"),
    [
        ("token", "keep", [17, 20, 34, 62]),  # 5 + 9 + 3; the flat group's tokens count, the failed rollout's do not
        ("token", "mask", [17, 20, 22, 42]),  # without the 12 and 20 cut ones
        ("sequence", "keep", [3, 4, 4, 4]),
        ("sequence", "mask", [3, 4, 4, 4]),
        ("constant", "keep", [60, 80, 80, 80]),
    ],
)
def test_denominators_of_four_minibatches(normalizer, overlong, denominators):
    plan = make_plan(normalizer=normalizer, overlong=overlong, minibatches_per_step=4)
    assert [part.denominator for part in minibatches(drawn(four_groups()), plan, CPU)] == denominators


@pytest.mark.parametrize(
    ("num_groups", "parts", "sizes"), [(8, 4, [2, 2, 2, 2]), (6, 4, [1, 2, 2, 1]), (2, 3, [1, 1, 0]), (0, 2, [0, 0])]
)
def test_minibatches_are_of_like_size(num_groups, parts, sizes):
    # Not [2, 2, 2, 0]: refill that ran dry, or many ranks, leave numbers that do not divide.
    plan = make_plan(normalizer="sequence", minibatches_per_step=parts)
    groups = [group(rollout(2, 1.0), rollout(3, 0.0), index=index) for index in range(num_groups)]
    assert [part.denominator / 2 for part in minibatches(drawn(groups), plan, CPU)] == sizes


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_ranks_change_no_minibatch_and_share_each(chunk):
    plan = make_plan(normalizer="sequence", minibatches_per_step=2)
    groups = [group(rollout(2, 1.0), rollout(3 + index, 0.0)) for index in range(8)]

    def lengths(part):
        return sorted(length for pack in part.packs for length in tokens_of(pack, "advantages") if length > 2)

    whole = [lengths(part) for part in minibatches(drawn(groups), plan, CPU)]
    assert whole == [[3, 6, 7, 10], [4, 5, 8, 9]]
    ranks = []
    for rank in (0, 1):
        mine = [place for place in range(8) if place // chunk % 2 == rank]
        part = StepRollouts(tuple(groups[place] for place in mine), tuple(mine), (), 0)
        ranks.append([lengths(part) for part in minibatches(part, plan, CPU)])
    assert [sorted(first + second) for first, second in zip(*ranks, strict=True)] == whole
    assert [len(part) for rank in ranks for part in rank] == [2, 2, 2, 2]


# --- the sum over the denominator is the paper's average


@pytest.mark.parametrize(
    ("normalizer", "loss"),
    [
        # On policy the loss of a token is -A; here A is 0.5 over 5 tokens, -0.5 over 9.
        ("token", -(5 * 0.5 - 9 * 0.5) / 14),
        ("sequence", 0.0),
        ("constant", -(5 * 0.5 - 9 * 0.5) / 40),
    ],
)
def test_the_loss_of_two_completions(model_dir, normalizer, loss):
    plan = make_plan(normalizer=normalizer, advantage="mean_only", kl_coef=0.0)
    values = run_step(make_learner(model_dir, plan), plan, [group(rollout(5, 1.0), rollout(9, 0.0))])
    assert values["loss"] == pytest.approx(loss, abs=1e-7)
    assert values["tokens"] == 14


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_micro_batches_and_the_order_of_groups_change_no_gradient(model_dir, name):
    groups = four_groups()
    one, values = gradient_of(model_dir, make_plan(name=name, kl_coef=0.1), groups)
    many, values_of_many = gradient_of(model_dir, make_plan(name=name, kl_coef=0.1, micro_batch_tokens=24), groups)
    turned, _ = gradient_of(model_dir, make_plan(name=name, kl_coef=0.1), groups[::-1])
    assert len(minibatches(drawn(groups), make_plan(name=name, micro_batch_tokens=24), CPU)[0].packs) > 5
    assert_same(one, many)
    assert_same(one, turned)
    assert values_of_many == pytest.approx(values, rel=1e-4)


def test_a_failed_rollout_changes_nothing(model_dir):
    kept = [rollout(5, 1.0), rollout(9, 0.0), rollout(3, 0.25)]
    plan = make_plan()
    with_failure, _ = gradient_of(model_dir, plan, [group(*kept[:1], rollout(7, None), *kept[1:])])
    without, _ = gradient_of(model_dir, plan, [group(*kept)])
    assert all(torch.equal(gradient, without[name]) for name, gradient in with_failure.items())


def test_flat_groups_without_penalty_give_no_gradient(model_dir):
    flat = [group(*[rollout(length, 0.1) for length in (3, 5, 7, 9, 11, 13, 15)])]  # the mean of seven 0.1 is not 0.1
    gradient, values = gradient_of(model_dir, make_plan(kl_coef=0.0), flat)
    assert all(not each.any() for each in gradient.values())
    assert (values["loss"], values["grad_norm"]) == (0.0, 0.0)
    assert values["ref_kld"] > 0  # measured all the same


# --- steps with little or nothing to learn from


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
@pytest.mark.parametrize(
    "groups",
    [
        [],  # refill found no group with a signal
        [group(rollout(4, None), rollout(5, None))],  # all failed
        [group(rollout(LIMIT, 1.0, "length"), rollout(LIMIT, 0.0, "length"))],  # all cut, and masked
    ],
    ids=["nothing", "failed", "masked"],
)
def test_a_step_without_trained_tokens_updates_nothing(model_dir, normalizer, groups):
    plan = make_plan(overlong="mask", normalizer=normalizer, minibatches_per_step=2)
    learner = make_learner(model_dir, plan)
    before = {name: master.clone() for name, master in learner.masters.items()}
    assert run_step(learner, plan, groups) == {"tokens": 0.0, "learning_rate": 0.01}
    assert learner.updates == 0
    assert all(torch.equal(master, before[name]) for name, master in learner.masters.items())


def test_an_empty_minibatch_is_passed_over(model_dir):
    plan = make_plan(overlong="mask", normalizer="token", minibatches_per_step=2)
    cut = group(rollout(LIMIT, 1.0, "length"), rollout(LIMIT, 0.0, "length"))
    learner, alone = make_learner(model_dir, plan), make_learner(model_dir, plan)
    values = run_step(learner, plan, [cut, four_groups()[0]])
    assert values == run_step(alone, make_plan(overlong="mask", normalizer="token"), [four_groups()[0]])
    assert (learner.updates, values["tokens"], values["ppo_kl"]) == (1, 17, 0.0)
