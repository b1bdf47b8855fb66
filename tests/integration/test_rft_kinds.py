"""RFT learns, with every algorithm and setting, and whatever the rewards do."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from project import Project, Run
from rft_project import NO_EVALUATION, RECIPE, prepare, rollouts, run_here

LEARNING: Final[dict[str, Any]] = {
    "rows_per_step": 8,
    "steps": 40,
    "eval_interval": 0,
    "optimizer": {"learning_rate": 3e-2, "schedule": "linear"},
    "algorithm": {"kl_coef": 0.0},
    "rollout": {"group_size": 8, "max_completion_tokens": 8, "eval_samples": 8},
    "seed": 1,
}
TREACHEROUS: Final = {7: "raises", 13: "sleeps", 21: "exits", 34: "nan"}
"""Four rows of fifty."""


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture(scope="module")
def learned(project: Project) -> Run:
    return run_here(project, "learning", **LEARNING)


def test_a_tiny_model_learns_a_toy_reward(learned: Run) -> None:
    rewards = [record["rollout/reward"] for record in learned.metrics()[1:]]
    assert rewards[0] < 0.1
    assert sum(rewards[-10:]) / 10 >= 0.95


def test_kl_is_0_at_step_0_and_on_policy(learned: Run) -> None:
    records = learned.metrics()[1:]
    assert records[0]["train/ref_kld"] == records[0]["train/ref_kld_k1"] == 0.0
    assert records[-1]["train/ref_kld"] > 1
    assert {record["train/ppo_kl"] for record in records} == {0.0}
    assert {record["train/clip_frac"] for record in records} == {0.0}


def test_the_outcome_says_base_and_best(learned: Run) -> None:
    held_out = {record["step"]: record["eval/reward"] for record in learned.metrics() if "eval/reward" in record}
    assert set(held_out) == {0, 40}
    assert held_out[40] > held_out[0] + 0.8
    assert learned.outcome()["message"] == (
        "finished 40 steps of runs/learning; "
        f"eval/reward {held_out[0]:.4f} at step 0, best {held_out[40]:.4f} at step 40"
    )


def test_after_a_warm_start_the_reference_is_the_adapter_it_began_from_also_after_a_resume(
    project: Project, learned: Run
) -> None:
    settings = LEARNING | {
        "lora": {"rank": 4, "alpha": 8, "warm_start": "runs/learning/adapter"},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "rows_per_step": 4,
    }
    whole = run_here(project, "warm", **settings | {"steps": 4})
    assert whole.metrics()[0]["eval/reward"] == learned.metrics()[-1]["eval/reward"]
    klds = [record["train/ref_kld"] for record in whole.metrics()[1:]]
    assert klds[0] == 0.0
    assert min(klds[1:]) > 0
    run_here(project, "warm-in-two", **settings | {"steps": 2})
    resumed = run_here(project, "warm-in-two", **settings | {"steps": 4})
    assert len(resumed.attempts()) == 2
    assert [record["train/ref_kld"] for record in resumed.metrics()[1:]] == klds
    assert resumed.adapter() == whole.adapter()


# --- every kind of recipe


@pytest.mark.parametrize("name", ["gspo", "cispo", "dapo", "dr_grpo"])
def test_each_algorithm_runs_and_is_first_evaluated_on_the_base(project: Project, learned: Run, name: str) -> None:
    algorithm = {"name": name, "minibatches_per_step": 2, "epochs_per_batch": 2, "overlong": "keep"}
    settings = {"algorithm": algorithm, "lora": {"rank": 2}, "rollout": LEARNING["rollout"], "seed": LEARNING["seed"]}
    run = run_here(project, name, steps=2, **settings)
    first, *steps = run.values()
    assert first == learned.values()[0]  # another adapter, the same base
    assert [record["train/updates"] for record in steps] == [4, 8]
    assert all(record["train/ppo_kl"] > 0 for record in steps)
    assert rollouts(run, 0) != rollouts(run, 1)


STOPS: Final = {"stop": list("aeiou12345678 "), "group_size": 8, "max_completion_tokens": 4, "chunk_prompts": 4}
"""About half of the completions come to an end."""


@pytest.mark.parametrize("overlong", ["keep", "mask", "punish"])
def test_cut_completions_are_treated_as_the_recipe_says(project: Project, overlong: str) -> None:
    algorithm = {"name": "dapo", "overlong": overlong, "overlong_reward": -3.0}
    rewards = [{"use": "rewards.py:length"}]
    settings = {"algorithm": algorithm, "rollout": STOPS, "rewards": rewards} | NO_EVALUATION
    run = run_here(project, overlong, steps=2, rows_per_step=4, **settings)
    drawn = rollouts(run, 0)
    is_cut = [each["finish_reason"] == "length" for each in drawn]
    assert 4 < sum(is_cut) < 28
    rewards_of_cut = {each["reward"] for each, cut in zip(drawn, is_cut, strict=True) if cut}
    assert (rewards_of_cut == {-3.0}) is (overlong == "punish")
    trained = [
        each["trained"].count("1") for each, cut in zip(drawn, is_cut, strict=True) if overlong != "mask" or not cut
    ]
    assert run.metrics()[0]["train/tokens"] == sum(trained)
    assert run.metrics()[0]["rollout/truncated_frac"] == sum(is_cut) / 32


def test_refill_trains_on_groups_with_a_signal_and_reports_the_others(project: Project) -> None:
    rollout = {**RECIPE["rollout"], "group_size": 2, "max_completion_tokens": 4, "refill": True}
    run = run_here(project, "refill", steps=2, rollout=rollout, **NO_EVALUATION)
    for step, record in enumerate(run.metrics()):
        drawn = rollouts(run, step)
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
        signal_of = [first["reward"] != second["reward"] for first, second in pairs]
        assert len(pairs) == record["rollout/groups"] > 6
        assert len({first["row"] for first, _ in pairs}) == len(pairs)
        assert record["rollout/flat_group_frac"] == pytest.approx(1 - sum(signal_of) / len(pairs))
        kept = [each for pair, has in zip(pairs, signal_of, strict=True) for each in pair if has]
        assert record["train/tokens"] == sum(each["trained"].count("1") for each in kept)
        assert record["rollout/sampled_tokens"] == sum(each["trained"].count("1") for each in drawn)


def test_epochs_pass_over_every_row(project: Project) -> None:
    rollout = {**RECIPE["rollout"], "group_size": 2, "max_completion_tokens": 2, "chunk_prompts": 8}
    run = run_here(project, "epochs", steps=None, epochs=1, rows_per_step=8, rollout=rollout, **NO_EVALUATION)
    assert run.steps() == [1, 2, 3]
    assert sorted({each["row"] for step in range(3) for each in rollouts(run, step)}) == list(range(24))


# --- rewards that misbehave


@pytest.fixture(scope="module")
def treacherous(project: Project) -> dict[str, Any]:
    """A step of fifty rows, of which each is asked twice and four have no reward: 8 in 100."""
    rows = [{"prompt": f"what is {number}?", "kind": TREACHEROUS.get(number, "good")} for number in range(50)]
    (project.root / "fifty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"train": "fifty.jsonl", "max_seq_tokens": 128},
        "eval_interval": 0,
        "rows_per_step": 50,
        "steps": 2,
        "rollout": {"group_size": 2, "max_completion_tokens": 3, "chunk_prompts": 25},
        "rewards": [{"use": "rewards.py:treacherous"}],
        "reward_limits": {"timeout_s": 1.0},
    }


def test_rewards_that_raise_hang_die_or_give_nan_are_counted_and_never_0(
    project: Project, treacherous: dict[str, Any]
) -> None:
    run = run_here(project, "treacherous", **treacherous)
    assert [record["rollout/failed"] for record in run.metrics()] == [8, 8]
    drawn = rollouts(run, 0)
    failures = {TREACHEROUS[each["row"]]: each["failure"] for each in drawn if each["row"] in TREACHEROUS}
    assert "LookupError: no reward for" in failures["raises"]
    assert "no answer within 1 s" in failures["sleeps"]
    assert "ended itself with status 7" in failures["exits"]
    assert "nan, not finite" in failures["nan"]
    assert {each["reward"] for each in drawn if each["row"] in TREACHEROUS} == {None}
    rewards = [each["reward"] for each in drawn if each["row"] not in TREACHEROUS]
    assert rewards == [1.0 + len(each["text"]) for each in drawn if each["row"] not in TREACHEROUS]
    assert run.metrics()[0]["rollout/reward"] == pytest.approx(sum(rewards) / 92)
    trained = sum(each["trained"].count("1") for each in drawn if each["reward"] is not None)
    assert run.metrics()[0]["train/tokens"] == trained


def test_too_many_failures_stop_the_run_with_the_first_traceback_and_a_mended_reward_goes_on(
    project: Project, treacherous: dict[str, Any]
) -> None:
    changes = treacherous | {"steps": 1, "reward_limits": {"timeout_s": 1.0, "max_failed_frac": 0.05}}
    run = run_here(project, "budget", code=2, **changes)
    outcome = run.outcome()
    assert (outcome["state"], outcome["exit_code"], outcome["step"]) == ("failed", 2, 0)
    assert outcome["message"].startswith(
        "8 of 100 rollouts have no reward, more than reward_limits.max_failed_frac (0.05); "
        "they are in runs/budget/rollouts/refused-step-000000. The first:\nreward treacherous: on fifty.jsonl:"
    )
    assert run.steps() == []
    rewards = project.root / "rewards.py"
    treacherous_text = rewards.read_text()
    try:
        rewards.write_text("def treacherous(completion, row):\n    return float(len(completion))\n")
        run_here(project, "budget", **changes)
    finally:
        rewards.write_text(treacherous_text)
    assert [record["rollout/failed"] for record in run.metrics()] == [0]
