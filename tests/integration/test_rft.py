"""RFT from a recipe to an adapter: the same bits twice and after any interruption, rewards that misbehave, learning."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from project import Done, Project, Run, wait_for

from trainer.worker import main

RECIPE: Final[dict[str, Any]] = {
    "name": "rft",
    "method": "rft",
    "data": {"train": "prompts.jsonl", "eval": "held_out.jsonl", "eval_rows": 6, "max_seq_tokens": 128},
    "rows_per_step": 4,
    "steps": 5,
    "algorithm": {"minibatches_per_step": 2},
    "rollout": {"group_size": 4, "max_completion_tokens": 10, "chunk_prompts": 1, "eval_samples": 2},
    "rewards": [{"use": "rewards.py:digits"}],
}
"""Four chunks a step; evaluated and saved at every second step."""
LEARNING: Final[dict[str, Any]] = {
    "name": "learning",
    "rows_per_step": 8,
    "steps": 40,
    "eval_interval": 0,
    "optimizer": {"learning_rate": 3e-2, "schedule": "linear"},
    "algorithm": {"kl_coef": 0.0},
    "rollout": {"group_size": 8, "max_completion_tokens": 8, "eval_samples": 8},
    "seed": 1,
}
NO_EVALUATION: Final[dict[str, Any]] = {"data__eval": None, "eval_interval": 0}
TREACHEROUS: Final = {7: "raises", 13: "sleeps", 21: "exits", 34: "nan"}
"""Four rows of fifty."""


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    shutil.copy(Path(__file__).with_name("rft_rewards.py"), shared.root / "rewards.py")
    for rows, prompts in (("train.jsonl", "prompts.jsonl"), ("eval.jsonl", "held_out.jsonl")):
        turns = [json.loads(line)["messages"] for line in (shared.root / rows).read_text().splitlines()]
        text = "".join(json.dumps({"messages": messages[:-1]}) + "\n" for messages in turns)
        (shared.root / prompts).write_text(text)
    shared.recipe("rft.yaml", **RECIPE)
    return shared


@pytest.fixture(scope="module")
def whole(project: Project) -> Run:
    """The run that nobody interrupts."""
    done = project.worker("rft.yaml", "--name", "whole")
    assert done.code == 0, done.said
    return project.run("whole")


@pytest.fixture(scope="module")
def here(project: Project) -> Iterator[Callable[..., Run]]:
    """Runs a recipe's worker in this process, which spares its start; `code` is what it must return."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def run(name: str, *arguments: str, code: int = 0, **changes: Any) -> Run:
        project.recipe(f"{name}.yaml", **{**RECIPE, "name": name, **changes})
        assert main([f"{name}.yaml", *arguments]) == code
        return project.run(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def learned(here: Callable[..., Run]) -> Run:
    return here("learning", **LEARNING)


def journal(run: Run, step: int | None = None) -> dict[str, bytes]:
    """The text of every chunk, by its place."""
    place = "*" if step is None else f"step-{step:06d}"
    return {str(file.relative_to(run.root)): file.read_bytes() for file in run.root.glob(f"rollouts/{place}/chunk-*")}


def rollouts(run: Run, step: int) -> list[dict[str, Any]]:
    """The rollout records of a step, from 0, in order."""
    chunks = [text.decode().split("\n")[1:-2] for _, text in sorted(journal(run, step).items())]
    return [json.loads(line) for lines in chunks for line in lines]


# --- the same bits


def test_a_run_logs_what_people_look_at(whole: Run) -> None:
    records = whole.metrics()
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert [record["step"] for record in records if "eval/reward" in record] == [0, 2, 4, 5]
    assert set(records[1]) >= {
        "train/loss", "train/ppo_kl", "train/ppo_kl_k1", "train/ref_kld", "train/ref_kld_k1", "train/sampler_kl",
        "train/clip_frac", "train/entropy", "train/grad_norm", "train/tokens", "train/updates", "rollout/reward",
        "rollout/reward/digits", "rollout/reward_std", "rollout/completion_tokens", "rollout/truncated_frac",
        "rollout/flat_group_frac", "rollout/failed", "perf/sample_s", "perf/learn_s", "perf/tokens_per_s",
    }  # fmt: skip
    assert [record["train/updates"] for record in records[1:]] == [2, 4, 6, 8, 10]
    assert all(record["train/ppo_kl"] > 0 for record in records[1:])
    assert all(record["train/sampler_kl"] < 1e-9 for record in records[1:])


def test_the_same_run_twice_gives_the_same_bits(project: Project, whole: Run) -> None:
    done = project.worker("rft.yaml", "--name", "twin")
    assert done.code == 0, done.said
    twin = project.run("twin")
    assert twin.values() == whole.values()
    assert twin.adapter() == whole.adapter()
    assert journal(twin) == journal(whole)


@dataclass
class Interrupted:
    """A run that was stopped in its first step, killed in its fourth, and then left alone."""

    run: Run
    stopped: Done
    outcome: dict[str, Any]
    written: list[dict[str, int]]
    """Chunks and their times of writing, after the stop and after the kill."""
    resumed: Done


@pytest.fixture(scope="module")
def interrupted(project: Project, whole: Run) -> Interrupted:
    run = project.run("interrupted")
    argv = [sys.executable, "-m", "trainer.worker", "rft.yaml", "--name", "interrupted"]
    slow = {"SLOW_S": "0.15"}  # a chunk takes half a second, so that a signal arrives between two
    written = []

    def is_sampling(step: int) -> Callable[[], bool]:
        return lambda: len(journal(run, step)) == 2

    def times() -> dict[str, int]:
        return {name: (run.root / name).stat().st_mtime_ns for name in journal(run)}

    started = project.start(argv, slow)
    wait_for(is_sampling(0), started)
    started.signal(signal.SIGTERM)
    stopped = started.wait()
    outcome = run.outcome()
    written.append(times())
    started = project.start(argv, slow)
    wait_for(is_sampling(3), started)
    project.kill_all()
    written.append(times())
    resumed = project.worker("rft.yaml", "--name", "interrupted")
    return Interrupted(run, stopped, outcome, written, resumed)


def test_a_stop_while_sampling_keeps_the_journal_and_says_run_again(interrupted: Interrupted) -> None:
    assert interrupted.stopped.code == 75, interrupted.stopped.said
    assert interrupted.outcome == {
        "state": "preempted",
        "step": 0,
        "message": "stopped while sampling step 1; what was sampled is kept",
        "exit_code": 75,
    }
    assert 2 <= len(interrupted.written[0]) < 4


def test_a_stopped_and_killed_run_equals_the_one_left_alone(interrupted: Interrupted, whole: Run) -> None:
    assert interrupted.resumed.code == 0, interrupted.resumed.said
    assert len(interrupted.run.attempts()) == 3
    assert interrupted.run.values() == whole.values()
    assert interrupted.run.adapter() == whole.adapter()
    assert interrupted.run.adapter("adapter-best") == whole.adapter("adapter-best")
    assert journal(interrupted.run) == journal(whole)


def test_only_chunks_that_were_not_written_are_sampled_again(interrupted: Interrupted, whole: Run) -> None:
    stopped, killed = interrupted.written
    now = {name: (interrupted.run.root / name).stat().st_mtime_ns for name in journal(interrupted.run)}
    assert {name: now[name] for name in stopped | killed} == stopped | killed
    of_last = len([name for name in killed if "step-000003" in name])
    assert 2 <= of_last < 4
    replayed = {record["step"]: record.get("perf/replayed_chunks") for record in interrupted.run.metrics()[1:]}
    assert replayed == {1: len(stopped), 2: 0, 3: 4, 4: of_last, 5: 0}  # the checkpoint is of step 2
    assert {record.get("perf/replayed_chunks") for record in whole.metrics()[1:]} == {0}


def test_two_ranks_draw_the_same_rows_and_rewards(project: Project, whole: Run) -> None:
    shape = {
        "name": "cpu2", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16,
        "micro_batch_tokens": 256, "accelerate": "cpu",
        "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
    }  # fmt: skip
    (project.root / "cpu2.yaml").write_text(json.dumps(shape))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv += ["-m", "trainer.worker", "rft.yaml", "--shape", "cpu2.yaml", "--name", "both"]
    done = project.start(argv).wait()
    assert done.code == 0, done.said
    both = project.run("both")
    assert both.attempts()[0]["ranks"] == 2
    for step in range(5):
        assert [(each["row"], each["token_ids"], each["reward"]) for each in rollouts(both, step)] == [
            (each["row"], each["token_ids"], each["reward"]) for each in rollouts(whole, step)
        ]
    for ours, theirs in zip(both.values(), whole.values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


# --- learning


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


# --- every kind of recipe


@pytest.mark.parametrize("name", ["gspo", "cispo", "dapo", "dr_grpo"])
def test_each_algorithm_runs_and_is_first_evaluated_on_the_base(
    here: Callable[..., Run], whole: Run, name: str
) -> None:
    algorithm = {"name": name, "minibatches_per_step": 2, "epochs_per_batch": 2, "overlong": "keep"}
    run = here(name, steps=2, algorithm=algorithm, lora={"rank": 2}, seed=0)
    first, *steps = run.values()
    assert first == whole.values()[0]  # another adapter, the same base
    assert [record["train/updates"] for record in steps] == [4, 8]
    assert all(record["train/ppo_kl"] > 0 for record in steps)
    assert rollouts(run, 0) != rollouts(run, 1)


STOPS: Final = {"stop": list("aeiou12345678 "), "group_size": 8, "max_completion_tokens": 4, "chunk_prompts": 4}
"""About half of the completions come to an end."""


@pytest.mark.parametrize("overlong", ["keep", "mask", "punish"])
def test_cut_completions_are_treated_as_the_recipe_says(here: Callable[..., Run], overlong: str) -> None:
    algorithm = {"name": "dapo", "overlong": overlong, "overlong_reward": -3.0}
    rewards = [{"use": "rewards.py:length"}]
    run = here(overlong, steps=2, algorithm=algorithm, rollout=STOPS, rewards=rewards, **NO_EVALUATION)
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


def test_refill_trains_on_groups_with_a_signal_and_reports_the_others(here: Callable[..., Run]) -> None:
    rollout = {**RECIPE["rollout"], "group_size": 2, "max_completion_tokens": 4, "refill": True}
    run = here("refill", steps=2, rollout=rollout, **NO_EVALUATION)
    for step, record in enumerate(run.metrics()):
        drawn = rollouts(run, step)
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
        signal_of = [first["reward"] != second["reward"] for first, second in pairs]
        assert len(pairs) == record["rollout/groups"] > 4
        assert len({first["row"] for first, _ in pairs}) == len(pairs)
        assert record["rollout/flat_group_frac"] == pytest.approx(1 - sum(signal_of) / len(pairs))
        kept = [each for pair, has in zip(pairs, signal_of, strict=True) for each in pair if has]
        assert record["train/tokens"] == sum(each["trained"].count("1") for each in kept)
        assert record["rollout/sampled_tokens"] == sum(each["trained"].count("1") for each in drawn)


def test_epochs_pass_over_every_row(here: Callable[..., Run]) -> None:
    rollout = {**RECIPE["rollout"], "group_size": 2, "max_completion_tokens": 2, "chunk_prompts": 8}
    run = here("epochs", steps=None, epochs=1, rows_per_step=8, rollout=rollout, **NO_EVALUATION)
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
    here: Callable[..., Run], treacherous: dict[str, Any]
) -> None:
    run = here("treacherous", **treacherous)
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
    here: Callable[..., Run], project: Project, treacherous: dict[str, Any]
) -> None:
    changes = treacherous | {"steps": 1, "reward_limits": {"timeout_s": 1.0, "max_failed_frac": 0.05}}
    run = here("budget", code=2, **changes)
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
        here("budget", **changes)
    finally:
        rewards.write_text(treacherous_text)
    assert [record["rollout/failed"] for record in run.metrics()] == [0]


# --- looking at rollouts


def test_rollouts_shows_a_step_as_json(project: Project, whole: Run) -> None:
    done = project.trainer("rollouts", "whole", "--step", "2", "--json")
    assert done.code == 0, done.said
    shown = json.loads(done.stdout)
    assert (shown["run"], shown["step"], len(shown["groups"])) == ("runs/whole", 2, 4)
    spreads = [group["spread"] for group in shown["groups"]]
    assert spreads == sorted(spreads, reverse=True)
    drawn = rollouts(whole, 1)  # the step that learns from them is the second
    for group in shown["groups"]:
        assert group["prompt"].startswith(f"what is the sum of {group['row']} and {3 * group['row']}?")
        assert group["where"] == f"prompts.jsonl:{group['row'] + 1}"
        rewards = [each["reward"] for each in group["rollouts"]]
        assert rewards == sorted(rewards, reverse=True)
        wanted = {(each["text"], each["reward"], each["advantage"]) for each in drawn if each["row"] == group["row"]}
        assert {(each["text"], each["reward"], each["advantage"]) for each in group["rollouts"]} == wanted
        assert sum(each["advantage"] for each in group["rollouts"]) == pytest.approx(0, abs=1e-6)


def test_rollouts_shows_a_step_to_people(project: Project, whole: Run) -> None:
    done = project.trainer("rollouts", "whole", "--groups", "2")
    assert done.code == 0, done.said
    lines = done.stdout.split("\n")
    assert lines[0] == "runs/whole, step 5: 4 prompts"  # the last one
    assert lines[2].startswith("prompts.jsonl:")
    assert "what is the sum of" in lines[2]
    best, *_, worst = lines[3:7]
    assert float(best.split()[0]) > float(worst.split()[0])
    assert float(best.split()[1]) > 0 > float(worst.split()[1])
    assert lines[-2] == "2 more prompts: --groups 4"
    assert all(letter.isprintable() for line in lines for letter in line)


def test_rollouts_of_a_step_that_is_not_there_says_which_are(project: Project, whole: Run) -> None:
    done = project.trainer("rollouts", "whole", "--step", "9")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == "runs/whole: no rollouts of step 9; there are 1 to 5\n"
