"""The rollouts of a step: which rows, in which chunks, what is replayed, and what they add up to."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
from plans import rft_plan
from torch import distributed
from torch._C._distributed_c10d import HashStore

from trainer.config.recipe import RFTRecipe
from trainer.data.order import rows_of_step
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import PreemptedError, RewardError
from trainer.rewards.runner import RewardRunner
from trainer.run.directory import RunDir
from trainer.run.journal import read_step
from trainer.training.group_sampler import GroupSampler, Prompt
from trainer.training.rollouts import (
    Rollouts,
    sampling_params,
    split_chunks,
    summarize,
)
from trainer.types import Completion, Row

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
REWARDS = '''
from trainer.rewards.contract import Score

def scripted(completion, row):
    """What the row's script says of this sample."""
    value = row["script"][int(completion.split()[2]) % len(row["script"])]
    if value == "raise":
        raise LookupError(f"no reward for {completion}")
    return value

def mended(completion, row):
    return float(int(completion.split()[2]) % 2)

def opened(completion, row):
    return float(completion.startswith("<think>\\n"))

def with_parts(completion, row):
    return Score(0.5, {"form": 1.0, "content": float(completion.split()[2])})
'''


class ScriptedSampler:
    """Draws (row, step, sample) as tokens, and one token more for a sample of odd number."""

    draws_apart = False

    def __init__(self):
        self.calls: list[list[int]] = []
        self.after_call = lambda: None

    def publish(self, policy, version):
        raise AssertionError("the loop publishes, not the rollouts")

    def sample(self, requests, params):
        self.calls.append([request.row for request in requests])
        self.after_call()
        return [
            [
                completion(request.row, params.step, sample)
                for sample in range(request.first_sample, request.first_sample + request.num_samples)
            ]
            for request in requests
        ]


def completion(row: int, step: int, sample: int) -> Completion:
    tokens = (row, step, sample) + (9,) * (sample % 2)
    return Completion(tokens, (-0.5,) * len(tokens), "length" if sample % 2 else "stop", step, f"{row} {step} {sample}")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """One real runner for each function."""
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "rewards.py").write_text(REWARDS)
    runners = {name: recipe(rewards=[{"use": f"rewards.py:{name}"}]) for name in USED}
    started = {
        name: RewardRunner(of_recipe.rewards, base_dir=directory).__enter__() for name, of_recipe in runners.items()
    }
    yield started
    for runner in started.values():
        runner.close()


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield StopFlag()
    for number, handler in before.items():
        signal.signal(number, handler)


def recipe(**changes) -> RFTRecipe:
    rollout = {"group_size": 2, "max_completion_tokens": 8, "chunk_prompts": 2, **changes.pop("rollout", {})}
    fields = {
        "name": "small",
        "method": "rft",
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl"},
        "steps": 10,
        "rows_per_step": 4,
        "algorithm": {},
        "rollout": rollout,
        "rewards": [{"use": "rewards.py:scripted"}],
    }
    return RFTRecipe.model_validate({**fields, **changes})


USED = ("scripted", "mended", "with_parts", "opened")
SIGNAL, FLAT = [1.0, 0.0], [0.5]


@pytest.fixture
def make(rewards, stop, tmp_path):
    """Rollouts over rows with these scripts, by default ten that all have a signal."""

    def make(scripts=(SIGNAL,) * 10, *, reward="scripted", run="run", world=WORLD, **changes):
        prompts = [
            Prompt(Row({"prompt": "?", "script": script}, "rows.jsonl", index + 1, index), (100 + index, 7))
            for index, script in enumerate(scripts)
        ]
        settings = recipe(**changes)
        assert settings.rollout is not None
        params = sampling_params(settings, settings.rollout, frozenset({2}))
        sampler = GroupSampler(ScriptedSampler(), rewards[reward], params, world, stop)
        return Rollouts(rft_plan(settings), prompts, sampler, RunDir(tmp_path / run))

    return make


def rows(groups) -> list[int]:
    return [group.row.index for group in groups]


@pytest.mark.parametrize(
    ("num_rows", "chunk_prompts", "ranks", "chunks"),
    [
        (5, 2, 1, [[0, 1], [2, 3], [4]]),
        (4, 8, 1, [[0, 1, 2, 3]]),
        (4, 8, 2, [[0, 1], [2, 3]]),  # smaller, so that each rank gets one
        (5, 8, 2, [[0, 1, 2], [3, 4]]),
        (2, 8, 4, [[0], [1]]),  # two ranks have nothing to do
        (0, 8, 2, []),
    ],
)
def test_rows_in_chunks(num_rows, chunk_prompts, ranks, chunks):
    assert list(split_chunks(range(num_rows), chunk_prompts, ranks)) == [range(c[0], c[-1] + 1) for c in chunks]


def test_a_step_draws_its_rows_chunk_by_chunk_with_the_noise_of_the_step(make):
    rollouts = make(rows_per_step=5)
    drawn = rollouts.of_step(1)
    wanted = rows_of_step(0, 1, 5, 10)
    assert rollouts.sampler.sampler.calls == [wanted[:2], wanted[2:4], wanted[4:]]
    assert rows(drawn.groups) == wanted
    assert drawn.sampled == drawn.groups
    assert drawn.num_replayed == 0
    first = drawn.groups[0].rollouts
    assert [rollout.token_ids for rollout in first] == [
        (100 + wanted[0], 7, wanted[0], 1, 0),
        (100 + wanted[0], 7, wanted[0], 1, 1, 9),
    ]
    assert [rollout.reward for rollout in first] == [1.0, 0.0]


def test_written_chunks_are_replayed_and_only_missing_ones_are_sampled(make):
    first = make(rows_per_step=5)
    whole = first.of_step(2)
    first.run.journal_chunk(2, 1).unlink()
    again = make(rows_per_step=5)
    drawn = again.of_step(2)
    assert again.sampler.sampler.calls == [rows_of_step(0, 2, 5, 10)[2:4]]
    assert drawn.num_replayed == 2
    assert drawn.groups == whole.groups
    assert make(rows_per_step=5).of_step(3).num_replayed == 0


def test_a_recorded_reward_is_replayed_even_if_the_reward_has_changed(make):
    whole = make().of_step(0)
    assert make(reward="mended").of_step(0).groups == whole.groups


@pytest.mark.parametrize("changes", [{"steps": 11}, {"steps": None, "epochs": 2}], ids=str)
def test_another_length_of_the_run_draws_again(make, changes):
    # The learning rate follows from the length, so the weights of this step are others than those that drew.
    make().of_step(1)
    assert make(**changes).of_step(1).num_replayed == 0


def test_a_stop_keeps_the_chunks_sampled_so_far(make, stop):
    whole = make(run="whole").of_step(0)
    stopped = make()
    stopped.sampler.sampler.after_call = lambda: stop.request("test")
    with pytest.raises(PreemptedError, match="stopped while sampling step 1; what was sampled is kept"):
        stopped.of_step(0)
    assert [file.name for file in stopped.run.journal(0).iterdir()] == ["chunk-0000.jsonl"]
    stop.reason = None
    resumed = make()
    assert resumed.of_step(0) == replace(whole, num_replayed=1)
    assert resumed.sampler.sampler.calls == [rows_of_step(0, 0, 4, 10)[2:]]


def test_a_row_that_comes_twice_in_a_step_is_drawn_with_other_noise(make):
    drawn = make([SIGNAL] * 3, rows_per_step=4).of_step(0)  # the fourth is of the next epoch
    (row,) = {row for row in range(3) if rows(drawn.groups).count(row) == 2}
    samples = [[r.token_ids[4] for r in group.rollouts] for group in drawn.groups if group.row.index == row]
    assert samples == [[0, 1], [2, 3]]
    assert make([SIGNAL] * 3, rows_per_step=4).of_step(0).groups == drawn.groups  # from the journal


def test_flat_groups_stay_without_refill(make):
    drawn = make([SIGNAL, FLAT, SIGNAL, FLAT]).of_step(0)
    assert sorted(rows(drawn.groups)) == [0, 1, 2, 3]


def test_refill_draws_further_rows_until_the_batch_is_full(make):
    scripts = [FLAT, SIGNAL] * 10
    drawn = make(scripts, rollout={"refill": True, "max_refill_rounds": 20}).of_step(0)
    assert len(drawn.groups) == 4
    assert all(row % 2 == 1 for row in rows(drawn.groups))
    own = rows_of_step(0, 0, 4, 20)
    assert rows(drawn.sampled)[:4] == own
    kept = [row for row in rows(drawn.sampled) if row % 2 == 1]
    assert rows(drawn.groups) == kept
    assert drawn.positions == (0, 1, 2, 3)
    assert len(set(rows(drawn.sampled))) == len(drawn.sampled) > 4


def test_refill_replays_alike(make):
    scripts = [FLAT, SIGNAL] * 10
    whole = make(scripts, rollout={"refill": True}).of_step(0)
    again = make(scripts, rollout={"refill": True})
    assert again.of_step(0).groups == whole.groups
    assert again.sampler.sampler.calls == []


def test_candidates_are_a_permutation_by_seed_and_step(make):
    def order(step, seed=0, run="run"):
        rollouts = make([FLAT] * 24, run=run, seed=seed, rollout={"refill": True, "max_refill_rounds": 12})
        return rows(rollouts.of_step(step).sampled)

    orders = {(seed, step): order(step, seed, f"run-{seed}") for seed in (0, 1) for step in (0, 1, 5)}
    assert all(sorted(found) == list(range(24)) for found in orders.values())
    own = {row for found in orders.values() for row in found[:4]}
    assert len(own) < 20
    assert len({tuple(row for row in found if row not in own) for found in orders.values()}) == 6
    assert all(found[:4] == rows_of_step(seed, step, 4, 24) for (seed, step), found in orders.items())
    assert order(5, 1, "another-run") == orders[1, 5]


@pytest.mark.parametrize(("rounds", "drawn"), [(1, 8), (2, 12), (4, 20)])
def test_refill_is_bounded(make, rounds, drawn):
    # All are flat: each round draws four more, the batch stays empty, and that is no error here.
    found = make([FLAT] * 100, rollout={"refill": True, "max_refill_rounds": rounds}).of_step(0)
    assert (len(found.groups), len(found.sampled)) == (0, drawn)


def test_refill_reports_what_it_spent(make):
    full = summarize(make([FLAT] * 100, rollout={"refill": True, "max_refill_rounds": 2}).of_step(0), WORLD)
    assert full["rollout/groups"] == 12
    assert full["rollout/sampled_tokens"] == 12 * (3 + 4)  # two samples a group, see ScriptedSampler
    assert full["rollout/flat_group_frac"] == 1.0


def test_failures_within_the_budget_go_on_and_are_counted(make):
    scripts = [["raise", 1.0]] + [SIGNAL] * 4
    drawn = make(scripts, rows_per_step=5).of_step(0)  # one of ten: exactly max_failed_frac
    values = summarize(drawn, WORLD)
    assert values["rollout/failed"] == 1
    assert values["rollout/reward"] == pytest.approx(5 / 9)  # of five 1.0 and four 0.0; the failure is no 0.0
    (group,) = [group for group in drawn.groups if group.row.index == 0]
    assert [rollout.reward for rollout in group.rollouts] == [None, 1.0]
    assert group.is_flat


def test_failures_over_the_budget_stop_the_run_with_the_first_traceback(make):
    scripts = [["raise"]] + [SIGNAL] * 4
    rollouts = make(scripts, rows_per_step=5)
    with pytest.raises(RewardError) as raised:
        rollouts.of_step(0)
    text = str(raised.value)
    assert text.startswith("2 of 10 rollouts have no reward, more than reward_limits.max_failed_frac (0.1)")
    assert "reward scripted: on rows.jsonl:1\nTraceback (most recent call last):" in text
    assert text.rstrip().endswith("LookupError: no reward for 0 0 0")  # the first sample, not the second


def test_a_mended_reward_is_not_answered_with_the_recorded_failures(make):
    scripts = [["raise"]] * 4
    with pytest.raises(RewardError) as raised:
        make(scripts).of_step(0)
    refused = make().run.rollouts / "refused-step-000000"
    assert f"they are in {refused}." in str(raised.value)
    failure = json.loads((refused / "chunk-0000.jsonl").read_text().split("\n")[-3])["failure"]
    assert "LookupError" in failure
    mended = make(scripts, reward="mended").of_step(0)
    assert summarize(mended, WORLD)["rollout/reward"] == 0.5


def test_a_row_that_the_reward_abstains_on_is_a_failure_not_a_zero(make):
    drawn = make([[None, 1.0], *[SIGNAL] * 4], rows_per_step=5).of_step(0)
    (group,) = [group for group in drawn.groups if group.row.index == 0]
    assert group.rollouts[0].failure == "every reward abstained"
    assert summarize(drawn, WORLD)["rollout/failed"] == 1


def test_parts_of_a_score_are_logged(make):
    values = summarize(make(reward="with_parts", rewards=[{"use": "rewards.py:with_parts"}]).of_step(0), WORLD)
    found = {name: value for name, value in values.items() if name.startswith("rollout/reward/")}
    assert found == {
        "rollout/reward/with_parts": 0.5,
        "rollout/reward/with_parts/form": 1.0,
        "rollout/reward/with_parts/content": 0.5,  # of samples 0 and 1
    }


@pytest.mark.parametrize(
    ("overlong", "script", "expected"),
    [
        # the sampler ends the first completion of a group by itself and cuts the second
        ("punish", [1.0, 1.0], [1.0, -2.0]),
        ("punish", [1.0, "raise"], [1.0, None]),  # a failure is never given a number
        ("keep", [1.0, 1.0], [1.0, 1.0]),
        ("mask", [1.0, 1.0], [1.0, 1.0]),  # left out later, and still part of its group's mean
        (None, [1.0, 1.0], [1.0, 1.0]),
    ],
)
def test_a_cut_completion_is_penalized_where_the_recipe_says_so(make, overlong, script, expected):
    algorithm = {"overlong": overlong, "overlong_reward": -2.0}
    drawn = make([script] * 4, algorithm=algorithm, reward_limits={"max_failed_frac": 1.0}).of_step(0)
    for group in drawn.groups:
        assert [rollout.finish_reason for rollout in group.rollouts] == ["stop", "length"]
        assert [rollout.reward for rollout in group.rollouts] == expected
        assert [bool(rollout.failure) for rollout in group.rollouts] == [reward is None for reward in expected]


def test_rollouts_carry_the_advantages_of_the_recipes_estimator_and_a_replay_has_the_same(make):
    scripts = [[1.0, 0.0], [0.5, 0.5], [3.0, -1.0], [1.0, 1.0]]
    settings = {"algorithm": {"advantage": "mean_only", "overlong": "punish", "overlong_reward": -2.0}}
    drawn = make(scripts, **settings).of_step(0)
    advantages = {group.row.index: [rollout.advantage for rollout in group.rollouts] for group in drawn.groups}
    assert advantages == {0: [1.5, -1.5], 1: [1.25, -1.25], 2: [2.5, -2.5], 3: [1.5, -1.5]}  # the second earns -2.0
    assert make(scripts, **settings).of_step(0).groups == drawn.groups


@pytest.fixture
def first_of_two_ranks():
    """Rank 0 of two, in a process group of its own: enough for what it does before ranks exchange groups."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield World(rank=0, size=2, device=torch.device("cpu"))
    distributed.destroy_process_group()


def test_a_chunk_of_another_number_of_ranks_is_drawn_again(make, stop, first_of_two_ranks):
    make().of_step(0)
    two = make(world=first_of_two_ranks)
    stop.request("test")  # the step ends after the rank's first chunk
    with pytest.raises(PreemptedError):
        two.of_step(0)
    assert two.sampler.sampler.calls == [rows_of_step(0, 0, 4, 10)[:2]]  # the rows of the recorded chunk
    header = json.loads(two.run.journal_chunk(0, 0).read_text().split("\n")[0])
    assert header["world_size"] == 2


def test_sampling_is_as_the_recipe_says():
    settings = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "max_completion_tokens": 12, "stop": ["###"]
    }  # fmt: skip
    found = recipe(seed=5, rollout=settings)
    assert found.rollout is not None
    params = sampling_params(found, found.rollout, frozenset({2, 3}))
    assert {name: getattr(params, name) for name in settings} == {**settings, "stop": ("###",)}
    assert (params.seed, params.stop_ids, params.is_greedy) == (5, frozenset({2, 3}), False)


def test_rewards_see_the_thinking_that_the_prompt_opens_and_the_journal_what_was_drawn(make):
    plain, opening = make(reward="opened", run="plain"), make(reward="opened", run="opening")
    opening.prompts = [replace(prompt, prefilled="<think>\n") for prompt in opening.prompts]
    rewards = [
        {rollout.reward for group in rollouts.of_step(0).groups for rollout in group.rollouts}
        for rollouts in (plain, opening)
    ]
    assert rewards == [{0.0}, {1.0}]
    texts = [rollout["text"] for group in read_step(opening.run, 0) for rollout in group.rollouts]
    assert not [text for text in texts if "<think>" in text]
