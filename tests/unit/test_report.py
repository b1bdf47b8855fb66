"""What the report says of a run: curves, timeline, rollouts and their bounds, the command, the vendored library."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan
from trainer.report import rollouts as rollouts_module
from trainer.report.charts import sections
from trainer.report.curves import MAX_POINTS, read_curves
from trainer.report.page import asset, script_json
from trainer.report.rollouts import RolloutReader
from trainer.report.run_report import RunReporter, Standing
from trainer.report.timeline import attempt_spans, events
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.journal import ChunkHeader, JournalPrompt, set_aside, write_chunk
from trainer.run.state import Outcome
from trainer.types import Group, Rollout, Row

FINISHED = Standing("finished", is_live=False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    return open_run(make_plan(load_recipe(write_small(tmp_path, RFT))))


def write_metrics(run: RunDir, records: list[dict[str, Any]]) -> None:
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_step(run: RunDir, step: int, rewards: list[float | None], num_rows: int = 1, text: str = "it is 1") -> None:
    """Rollouts of a journal step: the same rewards for each of its prompts."""
    rollout = Rollout((1, 7, 2), (False, True, True), (-0.5, -0.5), "stop", 0, text, 1.0, {"right": 1.0}, advantage=0.0)
    of_row = tuple(replace(rollout, reward=reward, failure=None if reward is not None else "x") for reward in rewards)
    groups = [Group(Row({}, "train.jsonl", index + 1, index), of_row) for index in range(num_rows)]
    asked = [
        JournalPrompt(index, f"train.jsonl:{index + 1}", ({"role": "user", "content": f"{index}?"},), {"answer": index})
        for index in range(num_rows)
    ]
    write_chunk(run, 0, ChunkHeader(step, tuple(range(num_rows)), len(rewards), 1, (10, None)), groups, asked)


def test_long_curves_are_means_with_a_band_and_evaluations_are_exact() -> None:
    records = [{"step": step, "time": 100.0 + step, "train/loss": float(step % 2)} for step in range(1, 2001)]
    records[1] |= {"eval/loss": 0.123456789}
    curves = read_curves(records, began=100.0)
    assert (curves.steps_per_point, curves.num_steps, len(curves.train.steps)) == (2, 2000, MAX_POINTS)
    assert (curves.train.steps[:2], curves.train.times[:2]) == ([2, 4], [2.0, 4.0])
    assert curves.train.values["train/loss"][0] == 0.5
    assert (curves.low["train/loss"][0], curves.high["train/loss"][0]) == (0.0, 1.0)
    assert (curves.held_out.steps, curves.held_out.values["eval/loss"]) == ([2], [0.123457])


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    records = [{"step": 1, "time": 1.0, "train/loss": math.nan}, {"step": 2, "time": 2.0, "train/loss": 0.5}]
    curves = read_curves(records, began=0.0)
    assert curves.train.values["train/loss"] == [None, 0.5]
    assert curves.not_finite == {"train/loss": 1}


def test_every_metric_has_a_chart_and_parts_of_the_reward_their_own() -> None:
    names = [
        "rollout/reward",
        "rollout/reward/form",
        "eval/reward",
        "eval/reward_low",
        "eval/reward_high",
        "odd/metric",
    ]
    found = sections(names)
    assert [section.title for section in found] == ["Learning", "Other metrics"]
    assert [chart.title for chart in found[0].charts] == ["Reward", "Reward: form"]
    assert {name for section in found for chart in section.charts for name in chart.names()} >= set(names)


def test_attempts_begin_at_their_checkpoint_and_say_how_they_ended(run: RunDir) -> None:
    attempts: list[dict[str, Any]] = [
        {"attempt": 1, "time": 100, "shape": "cpu", "ranks": 1, "host": "a"},
        {"attempt": 2, "time": 200, "shape": "cpu", "ranks": 2, "host": "b",
         "ended": {"state": "preempted", "step": 6, "message": "stopped after step 6", "time": 250.0}},
        {"attempt": 3, "time": 300, "shape": "cpu", "ranks": 1, "host": "a"},
    ]  # fmt: skip
    # Step 5 was made by attempt 1 and again, after the checkpoint of step 4, by attempt 2: only that record is left.
    times = {1: 110, 4: 140, 5: 210, 6: 240, 7: 310}
    records = [{"step": step, "time": float(time)} for step, time in times.items()]
    spans = attempt_spans(attempts, records, Outcome("finished", 7, "done", 0), is_live=False)
    assert [(each.from_step, each.to_step, each.state) for each in spans] == [
        (0, 4, "lost"), (4, 6, "preempted"), (6, 7, "finished"),
    ]  # fmt: skip
    assert [(each.began, each.ended) for each in spans] == [(0.0, None), (100.0, 150.0), (200.0, 210.0)]
    found = events(run, spans, records, began=100.0)
    assert [(each.kind, each.step) for each in found] == [("restart", 4), ("preempted", 6), ("restart", 6)]
    assert found[0].text == (
        "attempt 2 continues after step 4; attempt 1 ended without an outcome, as after SIGKILL or a power cut"
    )


def test_skipped_rows_and_refused_rollouts_are_events(run: RunDir) -> None:
    write_step(run, 2, [None, None])
    set_aside(run, 2)
    records = [{"step": 1, "time": 5.0, "train/skipped_rows": ["train.jsonl:4"]}]
    found = events(run, [], records, began=4.0)
    assert [(each.kind, each.step) for each in found] == [("skipped", 1), ("refused", 3)]
    assert "train.jsonl:4" in found[0].text


def test_how_an_attempt_ended_stays_when_the_next_one_begins(run: RunDir) -> None:
    number = run.take_attempt({"time": 1})
    run.end_attempt(number, Outcome("preempted", 3, "stopped after step 3", 75))
    run.outcome_file.unlink()
    run.take_attempt({"time": 2})
    first, second = run.read_attempts()
    assert (first["ended"]["state"], first["ended"]["step"]) == ("preempted", 3)
    assert "ended" not in second


def test_rollouts_are_bounded_and_what_is_left_out_is_said(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts_module, "MAX_ROLLOUTS", 32)
    for step in range(20):
        write_step(run, step, [1.0, 0.0], num_rows=4)
    found = RolloutReader(run, group_size=2, rows_per_step=4).read()
    assert [group.step for group in found.groups[::2]] == [1, 4, 6, 9, 12, 15, 17, 20]
    assert sum(len(group.rollouts) for group in found.groups) == 32
    assert found.left_out == (
        "8 of 20 steps, evenly spaced; up to 2 prompts of a step are left out. "
        "All of a step: trainer rollouts runs/small --step N"
    )
    monkeypatch.undo()
    assert RolloutReader(run, group_size=2, rows_per_step=4).read().left_out == ""


def test_long_completions_keep_their_beginning_and_end(run: RunDir) -> None:
    write_step(run, 0, [1.0], text="a" * 5000 + "z" * 5000)
    text = RolloutReader(run, 1, 1).read().groups[0].rollouts[0]["text"]
    assert text.startswith("aaaa")
    assert "6,000 of 10,000 characters left out" in text
    assert text.endswith("zzzz")


def test_a_rollout_of_several_turns_is_a_chat(run: RunDir) -> None:
    """As environments record it, in a file of the journal."""
    write_step(run, 0, [1.0])
    file = run.journal_chunk(0, 0)
    lines = file.read_text().split("\n")
    place = next(index for index, line in enumerate(lines) if "sampler_logprobs" in line)
    turns = [{"role": "assistant", "content": "higher?"}, {"role": "tool", "content": "lower"}]
    conversation = {
        "messages": [{"role": "user", "content": "0?"}, *turns],
        "num_prompt": 1,
        "turns": [],
        "stop": "done",
    }
    lines[place] = json.dumps(json.loads(lines[place]) | {"conversation": conversation})
    file.write_text("\n".join(lines))
    shown = RolloutReader(run, 1, 1).read().groups[0].rollouts[0]
    assert (shown["messages"], shown["stop"]) == (turns, "done")


def test_version_changes_with_what_the_page_shows(run: RunDir) -> None:
    reporter = RunReporter(run, lambda _: FINISHED)
    versions = [reporter.version()]
    write_metrics(run, [{"step": 0, "time": 1.0, "eval/reward": 0.5}])
    versions.append(reporter.version())
    write_step(run, 0, [1.0, 0.0])
    versions.append(reporter.version())
    assert reporter.version() == versions[-1]
    assert len(set(versions)) == 3


def test_command_writes_one_file_and_says_what_is_averaged(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(run, [{"step": step, "time": float(step), "train/loss": 1.0} for step in range(1, 1202)])
    assert main(["report", "small", "runs/small"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("page: report.html (")
    assert "each point is the mean of 2 of 1,201 steps" in captured.err
    text = Path("report.html").read_text()
    assert "default-src 'none'" in text
    before, _, rest = text.partition('id="data">')
    about, _, after = rest.partition("</script>")
    assert (before + after).count("://") == 1  # the comment in which uPlot names its home
    data = json.loads(about)
    assert [each["name"] for each in data["runs"]] == ["small"]  # named twice, shown once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: no such run. There are: small"),
        (["small", "--out", "missing/page.html"], "missing/page.html: No such file or directory. Name another file"),
        (["small", "--port", "80"], "--port needs --serve"),
        (["small", "--serve", "--out", "x.html"], "--serve writes no file: leave out --out"),
        (["small", "--serve", "--port", "99999"], "--port 99999: "),
    ],
)
def test_mistakes_are_said(run: RunDir, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_several_runs_show_where_they_differ(run: RunDir, tmp_path: Path) -> None:
    open_run(make_plan(load_recipe(write_small(tmp_path, SFT))), "other")
    assert main(["report", "small", "other"]) == 0
    data = json.loads(Path("report.html").read_text().split('id="data">')[1].split("</script>")[0])
    differing = {row["field"]: row["values"] for row in data["differences"]}
    assert differing["method"] == ["rft", "sft"]
    assert "optimizer.weight_decay" not in differing


def test_data_cannot_end_its_script_element() -> None:
    assert "<" not in script_json({"</script><img onerror=alert(1)>": "<!--"})


def test_wheel_carries_the_assets(tmp_path: Path) -> None:
    """Built from a copy: setuptools leaves files in the source directory."""
    root, source = Path(__file__).parents[2], tmp_path / "source"
    for name in ("trainer", "configs", "recipes", "datasets", "docs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    options = ["-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("trainer/report/assets/")}
    assert carried == {f"trainer/report/assets/{file.name}" for file in (root / "trainer/report/assets").iterdir()}


def test_vendored_files_are_those_of_the_published_package() -> None:
    about = json.loads(asset("vendored.json"))
    assert (about["name"], about["version"], about["license"]) == ("uPlot", "1.6.32", "MIT")
    for name, digest in about["files"].items():
        assert hashlib.sha256(asset(name).encode()).hexdigest() == digest, name
    assert f"v{about['version']}" in asset("uPlot.iife.min.js")[:200]
