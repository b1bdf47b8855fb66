"""Held-out values: what a failed reward earns, what pass@k counts, how sure the mean is."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal

import pytest
import torch

from trainer.config.recipe import DataSettings, RFTRecipe
from trainer.config.rft_sections import RewardSpec
from trainer.distributed.preemption import SIGNALS, StopFlag
from trainer.distributed.world import World
from trainer.errors import RewardError
from trainer.rewards.runner import RewardRunner
from trainer.run.intervals import bootstrap_interval
from trainer.sampling.sampler import SamplingParams
from trainer.training.evaluate import EvaluationSettings, HeldOutAnswer, PassRule, RewardEvaluation, pass_at_k
from trainer.training.group_sampler import GroupSampler, Prompt
from trainer.types import Completion, FinishReason, Row

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
DATA = DataSettings.model_validate({"train": "rows.jsonl"})
REWARDS = """
def scripted(completion, row):
    value = row["script"][len(completion)]
    return 1 / 0 if value == "raise" else value
"""


class CountingSampler:
    """The n-th sample of a prompt is n tokens long; the last of a prompt is cut."""

    draws_apart = False

    def __init__(self):
        self.asked = []

    def publish(self, policy, version):
        raise AssertionError("the loop publishes")

    def sample(self, requests, params):
        self.asked.append(([request.row for request in requests], params))
        return [[_completion(n, request.num_samples) for n in range(request.num_samples)] for request in requests]


def _completion(number: int, of: int) -> Completion:
    reason: FinishReason = "length" if number + 1 == of else "stop"
    return Completion((7,) * (number + 1), (-1.0,) * (number + 1), reason, 0, "x" * number)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "rewards.py").write_text(REWARDS)
    with RewardRunner([RewardSpec(use="rewards.py:scripted")], base_dir=directory) as runner:
        yield runner


@pytest.fixture(autouse=True)
def signals():
    """A stop flag installs handlers; they are put back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def evaluation(runner, scripts, num_samples, *, rule=None, max_failed_frac=1.0, **params):
    rows = [{"prompt": f"question {n}", "script": script} for n, script in enumerate(scripts)]
    prompts = [Prompt(Row(row, "eval.jsonl", n + 1, n), (1, n)) for n, row in enumerate(rows)]
    drawn = SamplingParams(max_completion_tokens=8, stop_ids=frozenset({2}), seed=3, step=9, **params)
    sampler = GroupSampler(CountingSampler(), runner, drawn, WORLD, StopFlag())
    settings = EvaluationSettings(num_samples, rule or PassRule(1.0), max_failed_frac, DATA)
    return RewardEvaluation(prompts, sampler, settings)


def test_values_of_two_prompts(runner):
    values = evaluation(runner, [[1.0, 0.0, 1.0], [0.0, 0.25, 0.0]], 3)()
    low, high = values.pop("eval/reward_low"), values.pop("eval/reward_high")
    assert values == pytest.approx(
        {
            "eval/reward": 2.25 / 6,
            "eval/pass_at_1": 1 / 3,  # of the first 2/3, of the second none reaches 1
            "eval/pass_at_3": 0.5,
            "eval/completion_tokens": 2.0,
            "eval/truncated_frac": 1 / 3,
            "eval/failed": 0.0,
            "eval/reward/scripted": 2.25 / 6,
        }
    )
    # Two rows drawn from two: means 1/12 (both the worse), 2.25/6 and 2/3, each end with chance 1/4.
    assert (low, high) == pytest.approx((0.25 / 3, 2 / 3))


def test_a_failed_reward_earns_nothing_and_is_counted(runner):
    # Leaving it out would give 1.0 and flatter a policy that breaks the scorer.
    values = evaluation(runner, [[1.0, "raise"], ["raise", 1.0]], 2)()
    assert (values["eval/reward"], values["eval/failed"], values["eval/pass_at_2"]) == (0.5, 2.0, 1.0)


def test_too_many_failed_rewards_stop_the_evaluation_with_the_first_traceback(runner, tmp_path):
    scripts = [[1.0, 1.0, 1.0, "raise"], [0.0, 0.0, 0.0, 0.0]]
    assert evaluation(runner, scripts, 4, max_failed_frac=0.125)()["eval/failed"] == 1.0
    with pytest.raises(
        RewardError, match=r"failed on 1 of 8 held-out answers, more than .*max_failed_frac \(0.1\)"
    ) as caught:
        evaluation(runner, scripts, 4, max_failed_frac=0.1)(tmp_path / "answers.jsonl")
    assert "Traceback" in str(caught.value)
    recorded = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert "Traceback" in recorded[0]["answers"][3]["failure"]


def test_answers_on_which_every_reward_abstains_are_left_out(runner):
    values = evaluation(runner, [[1.0, None], [None, None], [0.0, 0.5]], 2)()
    assert values["eval/reward"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert values["eval/reward/scripted"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert (values["eval/pass_at_1"], values["eval/pass_at_2"], values["eval/failed"]) == (0.5, 0.5, 0.0)
    with pytest.raises(RewardError, match="every reward abstained"):
        evaluation(runner, [[None, None]], 2)()


def test_a_reward_of_form_alone_is_no_success():
    """By default the whole sum must be reached: a format reward that is always 1 does not make pass@k 1."""
    rewards = [{"use": "last_number", "weight": 1.0}, {"use": "regex_match", "args": {"pattern": "x"}, "weight": 0.5}]
    recipe = {
        "name": "x",
        "method": "rft",
        "model": {"path": "m"},
        "data": {"train": "t"},
        "steps": 1,
        "rewards": rewards,
    }
    rule = PassRule.of(RFTRecipe.model_validate(recipe))
    assert rule == PassRule(1.5)

    def answer(reward: float | None, **rewards: float) -> HeldOutAnswer:
        return HeldOutAnswer("", reward, rewards, "stop", 1)

    assert [rule.passes(answer(value)) for value in (0.5, 1.0, 1.1 + 0.4, 1.5, None)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    by_name = {"success": {"reward": "last_number", "at_least": 1.0}}
    named = PassRule.of(RFTRecipe.model_validate({**recipe, "rollout": by_name}))
    assert named.passes(answer(1.0, last_number=1.0))
    assert not named.passes(answer(1.5, last_number=0.5))


def test_prompts_are_drawn_in_chunks_with_noise_of_their_own_at_the_recipe_s_temperature(runner):
    found = evaluation(runner, [[0.0]] * 20, 1, temperature=0.5, top_k=4)
    assert found() == found()
    sampler = found.sampler.sampler
    assert [rows for rows, _ in sampler.asked] == [list(range(16)), list(range(16, 20))] * 2
    for _, params in sampler.asked:
        assert (params.seed, params.step) == (3 + 1_000_003, 0)  # training draws with seed 3
        assert (params.temperature, params.top_k, params.is_greedy) == (0.5, 4, False)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_pass(k):
    generator = random.Random(k)
    rows = [[generator.choice([False, True]) for _ in range(n)] for n in (4, 4, 5, 6, 7)]
    shares = []
    for row in rows:
        subsets = list(itertools.combinations(row, k))
        shares.append(sum(any(subset) for subset in subsets) / len(subsets))
    assert pass_at_k(rows, k) == pytest.approx(sum(shares) / len(shares))


def test_bootstrap_is_a_function_of_values_and_seed():
    values = random.Random(1).choices(range(10), k=50)
    assert bootstrap_interval(values, 1) == bootstrap_interval(list(values), 1)
    assert bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_interval([0.25] * 9, 0) == (0.25, 0.25)


def test_bootstrap_is_as_wide_as_the_normal_interval_of_many_values():
    generator = random.Random(0)
    values = [float(generator.random() < 0.3) for _ in range(400)]
    mean = sum(values) / 400
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    low, high = bootstrap_interval(values, 0)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    hits = 0
    for trial in range(100):
        generator = random.Random(trial)
        values = [float(generator.random() < 0.4) for _ in range(40)]
        low, high = bootstrap_interval(values, trial)
        hits += low <= 0.4 <= high
    assert 88 <= hits <= 100  # 95 meant; three deviations of the count are 6.5
