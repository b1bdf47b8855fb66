"""RFT from a recipe to an adapter: the same bits twice, after any interruption and on two ranks."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from project import Done, Project, Run, wait_for
from rft_project import journal, prepare, rollouts


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture(scope="module")
def whole(project: Project) -> Run:
    """The run that nobody interrupts."""
    done = project.worker("rft.yaml", "--name", "whole")
    assert done.code == 0, done.said
    return project.run("whole")


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
        "message": "stopped while sampling step 1; what was sampled is kept; the state of step 0 of 5 is saved",
        "exit_code": 75,
        "is_transient": False,
    }
    assert 2 <= len(interrupted.written[0]) < 6


def test_a_stopped_and_killed_run_equals_the_one_left_alone(interrupted: Interrupted, whole: Run) -> None:
    assert interrupted.resumed.code == 0, interrupted.resumed.said
    assert len(interrupted.run.attempts()) == 3
    assert interrupted.run.values() == whole.values()
    assert interrupted.run.adapter() == whole.adapter()
    assert interrupted.run.adapter("adapter-best") == whole.adapter("adapter-best")
    assert journal(interrupted.run) == journal(whole)


def test_only_chunks_that_were_not_written_are_sampled_again(interrupted: Interrupted, whole: Run) -> None:
    stopped, killed = interrupted.written
    now = {
        name: file.stat().st_mtime_ns
        for name in journal(interrupted.run)
        if (file := interrupted.run.root / name).exists()
    }
    assert (stopped | killed).keys() <= journal(interrupted.run).keys()
    assert {name: when for name, when in (stopped | killed).items() if name in now}.items() <= now.items()
    assert any("step-000003" in name for name in now), "the newest steps are not compressed"
    of_last = len([name for name in killed if "step-000003" in name])
    assert 2 <= of_last < 6
    replayed = {record["step"]: record.get("perf/replayed_chunks") for record in interrupted.run.metrics()[1:]}
    assert replayed == {1: len(stopped), 2: 0, 3: 6, 4: of_last, 5: 0}  # the checkpoint is of step 2
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


def test_rollouts_shows_a_step_as_json(project: Project, whole: Run) -> None:
    done = project.trainer("rollouts", "whole", "--step", "2", "--json")
    assert done.code == 0, done.said
    shown = json.loads(done.stdout)
    assert (shown["run"], shown["step"], len(shown["groups"])) == ("runs/whole", 2, 6)
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
    assert lines[0] == "runs/whole, step 5: 6 prompts"  # the last one
    assert lines[2].startswith("prompts.jsonl:")
    assert lines[3].startswith("  user    what is the sum of")
    assert lines[4].split() == ["reward", "advantage", "tokens", "completion"]
    best, *_, worst = lines[5:9]
    assert float(best.split()[0]) > float(worst.split()[0])
    assert float(best.split()[1]) > 0 > float(worst.split()[1])
    assert lines[-2] == "4 more prompts: --groups 6"
    assert all(letter.isprintable() for line in lines for letter in line)


def test_rollouts_shows_what_was_asked_after_the_file_has_changed(project: Project, whole: Run) -> None:
    file = project.root / "prompts.jsonl"
    before = file.read_text()
    file.write_text(before.replace("what is the sum of", "what is the product of"))
    try:
        done = project.trainer("rollouts", "whole", "--groups", "9")
    finally:
        file.write_text(before)
    assert done.stdout.count("what is the sum of") == 6, done.said
    assert "product" not in done.stdout


def test_rollouts_of_a_step_that_is_not_there_says_which_are(project: Project, whole: Run) -> None:
    done = project.trainer("rollouts", "whole", "--step", "9")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == "runs/whole: no rollouts of step 9; there are 1 to 5\n"
