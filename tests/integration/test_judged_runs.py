"""Runs whose rewards a server computes, whose rows choose their rewards, and whose journal is pruned."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, judging
from project import Project, is_at_step, wait_for
from rft_project import NO_EVALUATION, journal, prepare, rollouts, run_here

from trainer.run.directory import RunDir


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    return prepare(shared)


@pytest.fixture
def server(tmp_path: Path):
    with judging(tmp_path / "server") as running:
        yield running


def judge(server: JudgeServer, **args: Any) -> dict[str, Any]:
    return {"use": "llm_judge", "args": {"url": server.url, "model": "m", "rubric": "Many x are good.", **args}}


def test_a_judged_run_logs_its_cost_and_is_not_paid_twice(
    project: Project, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-4711")
    reward = judge(server, cache=str(tmp_path / "answers"), api_key_env="JUDGE_KEY")
    changes: dict[str, Any] = {"rewards": [reward], "steps": 2, "rows_per_step": 2}
    run = run_here(project, "judged", **changes)
    num_calls = len(server.requests())
    assert num_calls > 0
    records = run.metrics()[1:]
    # evaluations draw 6 x 2 answers before the first step, 2 x 4 completions a step; equal texts are asked once
    asked = [record["perf/judge_calls"] + record["perf/judge_cache_hits"] for record in records]
    assert asked == [12 + 8, 8]
    assert records[0]["perf/judge_prompt_tokens"] == 100 * records[0]["perf/judge_calls"]
    assert all(0 <= record["rollout/reward/llm_judge"] <= 1 for record in records)
    again = run_here(project, "judged_again", **changes)
    assert len(server.requests()) == num_calls
    assert again.values() == run.values()
    files = [file for file in run.root.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert not [file for file in files if b"sk-secret" in file.read_bytes()]


def test_an_outage_is_waited_out_and_the_ledger_is_shown(project: Project, server: JudgeServer) -> None:
    fields: dict[str, Any] = {"rewards": [judge(server, num_retries=0, concurrency=1)], "steps": 1, "rows_per_step": 2}
    undisturbed = run_here(project, "calm", **fields, **NO_EVALUATION)
    server.always({"status": 503})
    num_before = len(server.requests())

    def come_back() -> None:
        while len(server.requests()) == num_before:
            time.sleep(0.05)
        server.always(None)

    back = threading.Thread(target=come_back)
    back.start()
    disturbed = run_here(project, "outage", **fields, **NO_EVALUATION)
    back.join()
    assert disturbed.values() == undisturbed.values()
    assert sum(record["perf/judge_outage_s"] for record in disturbed.metrics()) > 0
    done = project.trainer("rollouts", "outage")
    assert done.code == 0, done.said
    assert re.search(r"^judges: \d+ answers for [\d,]+ prompt and [\d,]+ completion tokens$", done.stdout, re.MULTILINE)


def test_a_stop_while_a_judge_is_awaited_is_a_preemption_and_the_run_goes_on(
    project: Project, server: JudgeServer
) -> None:
    fields: dict[str, Any] = {"rewards": [judge(server, num_retries=0)], "steps": 1, **NO_EVALUATION}
    whole = run_here(project, "whole", **fields)
    server.always({"status": 503})
    file = json.loads((project.root / "whole.yaml").read_text()) | {"name": "stopped"}
    (project.root / "stopped.yaml").write_text(json.dumps(file))
    running = project.start_worker("stopped.yaml")
    wait_for(lambda: "waiting for it" in running.err.read_text(), running)
    running.signal(signal.SIGTERM)
    done = running.wait()
    assert done.code == 75, done.said
    assert "stopped while a judge was awaited" in done.stderr
    server.always(None)
    assert project.worker("stopped.yaml").code == 0
    assert project.run("stopped").values() == whole.values()


def test_a_group_judge_compares_the_completions_of_a_prompt(project: Project, server: JudgeServer) -> None:
    run = run_here(project, "grouped", rewards=[judge(server, compare="group")], steps=1, **NO_EVALUATION)
    assert len(server.requests()) == 6  # one for each prompt
    assert len([each for each in rollouts(run, 0) if each["reward"] is not None]) == 24


def test_rows_choose_their_rewards_and_means_count_only_those(project: Project) -> None:
    lines = [json.loads(line) for line in (project.root / "prompts.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"task": ["digits"] if number % 3 else "length"}
    (project.root / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewards = [{"use": "rewards.py:digits"}, {"use": "soft_overlong", "label": "length"}]
    rewards[1]["args"] = {"max_characters": 8, "ramp_characters": 8}  # type: ignore[assignment]
    fields: dict[str, Any] = {"rewards": rewards, "reward_column": "task", "steps": 2, **NO_EVALUATION}
    run = run_here(project, "tasks", **fields, data__train="tasks.jsonl")
    for step, record in enumerate(run.metrics()):
        drawn = rollouts(run, step)
        assert {tuple(each["rewards"]) for each in drawn} == {("digits",), ("length",)}
        for name in ("digits", "length"):
            given = [each["rewards"][name] for each in drawn if name in each["rewards"]]
            assert record[f"rollout/reward/{name}"] == pytest.approx(sum(given) / len(given))


def test_long_prompts_are_dropped_and_counted(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (project.root / "prompts.jsonl").read_text().splitlines()]
    for line in lines[::4]:
        line["messages"][0]["content"] += " please" * 100
    (project.root / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields: dict[str, Any] = {"steps": 5, **NO_EVALUATION, "data__train": "long.jsonl"}
    run_here(project, "too_long", code=2, **fields)
    assert "or set data.overlong to drop" in capfd.readouterr().err
    run = run_here(project, "dropped", **fields, data__overlong="drop")
    assert f"{len(lines[::4])} of {len(lines)} prompts are dropped (data.overlong)" in capfd.readouterr().err
    rows = {each["row"] for step in range(5) for each in rollouts(run, step)}
    assert len(rows) == len(lines) - len(lines[::4])
    assert not {row for row in rows if row % 4 == 0}


def test_a_pruned_run_equals_a_whole_one_also_when_it_is_killed(project: Project) -> None:
    fields: dict[str, Any] = {"steps": 6, "dcp_save_interval": 1, "keep_last": 2, "rows_per_step": 2, **NO_EVALUATION}
    whole = run_here(project, "kept", **fields)
    file = json.loads((project.root / "kept.yaml").read_text()) | {"name": "pruned"}
    file["rollout"]["keep_steps"] = 2
    (project.root / "pruned.yaml").write_text(json.dumps(file))
    run = project.run("pruned")
    running = project.start_worker("pruned.yaml")
    wait_for(is_at_step(run, 4), running)
    running.signal(signal.SIGKILL)
    running.process.wait()
    done = project.worker("pruned.yaml")
    assert done.code == 0, done.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()
    steps = RunDir(run.root).journal_steps()
    assert steps[-1] == 5
    assert len(steps) <= 3
    assert [journal(run, step) for step in steps] == [journal(whole, step) for step in steps]
    assert RunDir(whole.root).journal_steps() == list(range(6))
    compressed = {file.parent.name for file in whole.root.glob("rollouts/step-*/chunk-*.gz")}
    assert "step-000000" in compressed
    assert "step-000005" not in compressed
    shown = project.trainer("rollouts", "kept", "--step", "1")
    assert shown.code == 0, shown.said
    gone = project.trainer("rollouts", "pruned", "--step", "1")
    assert gone.code == 2
    assert "(older ones are removed: rollout.keep_steps)" in gone.stderr
