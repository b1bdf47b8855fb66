"""Runs with environments: killed within a turn they end with equal bits, and a dead environment ends nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from project import Project, Run, wait_for
from rft_project import RECIPE, journal, prepare, rollouts, run_here

from trainer.commands.certificate import compare_runs
from trainer.commands.cli import main
from trainer.run.directory import RunDir

# A random model draws no stop token, but soon a letter: its turns end there.
ECHO: dict[str, Any] = {
    "data": {"train": "asks.jsonl", "max_seq_tokens": 128},
    "rows_per_step": 4,
    "steps": 3,
    "rewards": [],
    "rollout": {
        "group_size": 3,
        "max_completion_tokens": 12,
        "stop": ["a", "e", "i", "o", "n", "s", " "],
        "chunk_prompts": 2,
        "environment": "guessing.py:Echo",
        "deterministic": True,
    },
    "algorithm": {"normalizer": "sequence"},
    "eval_interval": 0,
    "dcp_save_interval": 1,
}


@pytest.fixture(scope="module")
def asks(shared: Project) -> Project:
    project = prepare(shared)
    shutil.copy(Path(__file__).with_name("guessing.py"), project.root / "guessing.py")
    rows = [{"ask": f"what is {number}?"} for number in range(8)]
    (project.root / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return project


@pytest.fixture(scope="module")
def whole(asks):
    return run_here(asks, "whole", **ECHO)


def test_every_turn_is_trained_and_no_observation_is(whole):
    records = rollouts(whole, 0)
    assert {len(each["conversation"]["turns"]) for each in records} > {1}, "some have several turns"
    for record in records:
        conversation = record["conversation"]
        drawn = [index for index, flag in enumerate(record["trained"]) if flag == "1"]
        spans = [index for turn in conversation["turns"] for index in range(turn["begin"], turn["end"])]
        assert not conversation["later"], "this template keeps what was said"
        assert drawn == spans
        assert record["reward"] == sum(turn["reward"] or 0.0 for turn in conversation["turns"])
        said = [message["role"] for message in conversation["messages"][conversation["num_prompt"] :]]
        assert said[::2] == ["assistant"] * len(conversation["turns"])


def test_turns_have_noise_of_their_own(whole):
    """With the noise of turn 0 in every turn, a random policy would repeat its first tokens far more often."""
    pairs = [
        [record["token_ids"][turn["begin"]] for turn in record["conversation"]["turns"][:2]]
        for step in range(3)
        for record in rollouts(whole, step)
    ]
    several = [pair for pair in pairs if len(pair) == 2]
    assert sum(first == second for first, second in several) < len(several) / 2


def test_a_run_killed_in_the_middle_of_a_turn_ends_with_equal_bits(asks, whole):
    asks.recipe("killed.yaml", **{**RECIPE, **ECHO, "name": "killed"})
    (asks.root / "wait").touch()
    running = asks.start_worker("killed.yaml")
    wait_for((asks.root / "waiting").exists, running)
    running.signal(signal.SIGKILL, group=True)
    running.wait()
    (asks.root / "wait").unlink()
    killed = run_here(asks, "killed", **ECHO)
    assert without_seconds(journal(killed)) == without_seconds(journal(whole))
    assert killed.adapter() == whole.adapter()


@pytest.mark.heavy
def test_verify_resume_of_a_run_with_environment_and_tools_is_equal(asks):
    """Real kills of the process tree: while saving, between chunks of conversations, while learning."""
    changes = {
        "model": {"path": "model", "compute_dtype": "float32", "chat_template": "hermes"},
        "data": {"train": "asks.jsonl", "max_seq_tokens": 1024},
        "rollout": ECHO["rollout"] | {"tools": ["guessing.py:double"], "chunk_prompts": 1, "max_completion_tokens": 40},
        "steps": 6,
    }
    file = asks.recipe("verified.yaml", **{**RECIPE, **ECHO, **changes, "name": "verified"})
    done = asks.trainer("verify-resume", file, "--kills", "3", "--json")
    assert done.code == 0, done.said
    certificate = json.loads(done.stdout)
    assert certificate["equal"] is True
    assert [kill["phase"] for kill in certificate["kills"]] == ["saving", "sampling", "training"]
    assert 0 < certificate["tokens_sampled_twice"] < certificate["tokens_sampled"]
    (home,) = (asks.root / "runs").glob("verified.verify-*")
    turns = [len(each["conversation"]["turns"]) for each in rollouts(Run(home / "interrupted"), 0)]
    assert max(turns) > 1


def test_verify_resume_refuses_an_environment_that_is_not_called_deterministic(asks, monkeypatch, capsys):
    rollout = {name: value for name, value in ECHO["rollout"].items() if name != "deterministic"}
    file = asks.recipe("undecided.yaml", **{**RECIPE, **ECHO, "name": "undecided", "rollout": rollout})
    monkeypatch.chdir(asks.root)
    assert main(["verify-resume", file]) == 2
    assert "set `rollout.deterministic: true`" in capsys.readouterr().err


def test_what_a_kill_between_chunks_leaves_goes_on_to_runs_that_verify_resume_calls_equal(asks, whole):
    """Checkpoint of step 2, one of the two chunks of step 3: the conversations of the other are played again."""
    run = run_here(asks, "cut", **ECHO)
    assert run.checkpoints() == [2, 3]
    shutil.rmtree(run.newest_checkpoint())
    _, lost = sorted((run.root / "rollouts" / "step-000002").iterdir())
    lost.unlink()
    (run.root / "outcome.json").unlink()
    resumed = run_here(asks, "cut", **ECHO)
    assert len(resumed.attempts()) == 2
    found = compare_runs(RunDir(whole.root), RunDir(resumed.root))
    assert found["equal"], found["problems"]
    assert 0 < found["tokens_sampled_twice"] < found["tokens_sampled"]
    assert without_seconds(journal(resumed)) == without_seconds(journal(whole))


def test_environments_killed_within_a_turn_are_played_again_with_equal_bits(asks, whole):
    """First the process of one rollout, then the one that forks them, while every environment waits in a step."""
    asks.recipe("struck.yaml", **{**RECIPE, **ECHO, "name": "struck"})
    (asks.root / "waiting").unlink(missing_ok=True)
    (asks.root / "wait").touch()
    running = asks.start_worker("struck.yaml")
    wait_for((asks.root / "waiting").exists, running)
    environment = environments(running)[0]
    zygote = environment.parent()
    assert zygote is not None
    environment.kill()
    wait_for(lambda: environment.pid not in {each.pid for each in environments(running)}, running)
    zygote.kill()
    wait_for(lambda: environments(running) and environments(running)[0].ppid() != zygote.pid, running)
    (asks.root / "wait").unlink()
    done = running.wait()
    assert done.code == 0, done.said
    assert "is played again from its start" in done.said
    assert "it is started again" in done.said
    struck = asks.run("struck")
    assert without_seconds(journal(struck)) == without_seconds(journal(whole))
    assert struck.adapter() == whole.adapter()


def environments(running: Any) -> list[psutil.Process]:
    """The processes of rollouts: forked by a process that runs the same command."""
    found = []
    for each in psutil.Process(running.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            parent = each.parent()
            if parent is not None and all("trainer.environments.zygote" in it.cmdline() for it in (each, parent)):
                found.append(each)
    return found


def test_a_dead_environment_is_a_failed_rollout(asks):
    (asks.root / "die").write_text("what is 3?")
    try:
        limits = {"max_failed_frac": 1.0}
        run = run_here(asks, "dying", **{**ECHO, "steps": 2, "reward_limits": limits})
    finally:
        (asks.root / "die").unlink()
    records = [record for step in range(2) for record in rollouts(run, step)]
    dead = [record for record in records if record["where"].endswith(":4")]
    assert dead
    assert all(record["conversation"]["stop"] == "environment_died" for record in dead)
    assert all("ended itself with status 7" in record["failure"] for record in dead)
    assert all(record["reward"] is not None for record in records if record not in dead)


VERIFIERS = Path(os.environ.get("VERIFIERS_PYTHON", Path(__file__).parents[2] / ".venv-verifiers/bin/python"))


@pytest.mark.heavy
@pytest.mark.skipif(not VERIFIERS.exists(), reason="no interpreter with verifiers (VERIFIERS_PYTHON)")
def test_a_taskset_of_verifiers_is_trained(asks):
    example = Path(__file__).parents[2] / "examples" / "verifiers_taskset"
    for name in ("shop_tasks.py", "rows.jsonl"):
        shutil.copy(example / name, asks.root / name)
    changes: dict[str, Any] = {
        "model": {"path": "model", "chat_template": "hermes"},
        "data": {"train": "rows.jsonl", "max_seq_tokens": 512},
        "rows_per_step": 1,
        "steps": 1,
        "algorithm": {},
        "rewards": [],
        "rollout": {
            "group_size": 2,
            "max_completion_tokens": 8,
            "stop": ["a", "e", "i", "o", "n", "s", " "],
            "max_turns": 2,
            "environment": {"verifiers": "shop_tasks", "python": str(VERIFIERS)},
            "environment_limits": {"timeout_s": 240, "memory_limit_gib": 4},
        },
        "eval_interval": 0,
    }
    run = run_here(asks, "shop", **changes)
    records = rollouts(run, 0)
    assert len(records) == 2
    assert all(record["conversation"]["stop"] == "done" for record in records)
    assert all(record["rewards"]["environment/asked"] == 0.0 for record in records), "a random policy calls no tool"
    assert all(record["conversation"]["tools"][0]["function"]["name"] == "shop_price" for record in records)


def without_seconds(chunks: dict[str, bytes]) -> dict[str, Any]:
    """The journal without the time that environments took."""
    parsed: dict[str, Any] = {}
    for place, text in chunks.items():
        lines = [json.loads(line) for line in text.decode().split("\n")[:-1]]
        for line in lines:
            for turn in line.get("conversation", {}).get("turns", []):
                turn["seconds"] = 0.0
        parsed[place] = lines
    return parsed
