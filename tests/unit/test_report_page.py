"""The report in a real headless Chromium: elements, filters, keyboard, hostile texts, phone width, the live page."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, Tab, chromium
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main
from trainer.commands.report import standing
from trainer.config.load import load_recipe
from trainer.planning.plan import make_plan
from trainer.report.run_report import RunReporter
from trainer.report.server import LiveReport, make_server
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.journal import ChunkHeader, JournalPrompt, write_chunk
from trainer.run.polling import wait_until
from trainer.types import Group, Rollout, Row

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
"""Would change the title if any of it were markup."""
NAME = "<img src=x onerror=alert(1)>"
RIGHT = Rollout((1, 7, 2), (False, True, True), (-0.5, -0.5), "stop", 0, "it is 1", 1.0,
                {"right": 1.0, "form": 1.0}, advantage=0.5)  # fmt: skip
WRONG = replace(RIGHT, text=HOSTILE, reward=0.0, rewards={"right": 0.0, HOSTILE: 0.0}, advantage=-0.5)
FAILED = replace(RIGHT, text="", finish_reason="length", reward=None, advantage=None, failure=f"KeyError: {HOSTILE}")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Two steps, one evaluation before and one after, a chat of turns, a restart; the directory's name is markup."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(open_run(make_plan(load_recipe(write_small(tmp_path, RFT)))).root.rename(Path("runs") / NAME))
    records: list[dict[str, Any]] = [
        {"step": 0, "time": 10.0, "eval/reward": 0.0, "eval/reward_low": 0.0, "eval/reward_high": 0.2},
        {"step": 1, "time": 20.0, "rollout/reward": 0.5, "train/loss": 0.1, HOSTILE: 1.0},
        {"step": 2, "time": 40.0, "rollout/reward": 0.9, "train/loss": 0.1, "eval/reward": 1.0,
         "eval/reward_low": 0.8, "eval/reward_high": 1.0},
    ]  # fmt: skip
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for moment in (5, 30):
        run.take_attempt({"time": moment, "shape": "cpu", "ranks": 1, "host": HOSTILE})
    turns = ({"role": "system", "content": HOSTILE}, {"role": "user", "content": "First?"},
             {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
             {"role": "tool", "content": "2"}, {"role": "user", "content": "And 0 + 1?"})  # fmt: skip
    asked = JournalPrompt(0, "train.jsonl:1", turns, {"answer": HOSTILE})
    for step, rollouts in enumerate([(RIGHT, WRONG), (RIGHT, FAILED)]):
        groups = [Group(Row({}, "train.jsonl", 1, 0), rollouts)]
        write_chunk(run, 0, ChunkHeader(step, (0,), 2, 1, (10, None)), groups, [asked])
    run.evaluation(0).parent.mkdir()
    for step, reward in ((0, 0.0), (2, 1.0)):
        answer = {"text": f"{HOSTILE} {step}", "reward": reward, "finish_reason": "stop", "failure": None}
        record = asked.record() | {"answers": [answer]}
        run.evaluation(step).write_text(json.dumps(record) + "\n")
    return run


def open_report(tab: Tab, run: RunDir, *others: RunDir, **how: Any) -> str:
    assert main(["report", str(run.root), *(str(other.root) for other in others)]) == 0
    url = Path("report.html").resolve().as_uri()
    tab.open(url, **how)
    return url


def choose(tab: Tab, index: int, value: str) -> None:
    """Choose in a filter of the rollouts."""
    box = f"document.querySelectorAll('#rollouts select')[{index}]"
    tab.run(f"{box}.value = {json.dumps(value)}; {box}.dispatchEvent(new Event('change'))")


def texts(tab: Tab, selector: str) -> list[str]:
    return list(tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent)"))


def test_everything_is_there_and_nothing_is_asked_for(tab: Tab, run: RunDir) -> None:
    url = open_report(tab, run)
    assert tab.complaints == []
    assert tab.requests == [url]
    assert texts(tab, "h1") == [NAME]
    assert texts(tab, ".section > summary > h2, section > h2") == [
        "Learning", "Optimizer", "Other metrics", "Attempts and events", "Before and after", "Rollouts", "Recipe",
    ]  # fmt: skip
    assert texts(tab, "details[open] .chart:not([hidden]) h3") == ["Reward", "Policy loss"]
    assert tab.run("document.querySelectorAll('details[open] .chart canvas').length") == 2
    assert texts(tab, ".events .state") == ["restart"]
    assert texts(tab, ".detail .role") == ["system", "user", "assistant", "tool", "user"]
    assert texts(tab, ".detail .rollout .reward") == ["1", "0"]
    assert texts(tab, ".side h4") == ["Before (step 0)", "After (step 2)"]
    assert "0.000 → 1.000" in texts(tab, ".verdict")[0]


def test_answers_of_sft_stand_side_by_side_and_nothing_judges_them(
    tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(make_plan(load_recipe(write_small(tmp_path, SFT))))
    run.metrics_file.write_text(json.dumps({"step": 1, "time": 20.0, "train/loss": 0.1}) + "\n")
    asked = JournalPrompt(0, "eval.jsonl:1", ({"role": "user", "content": "1 + 1?"},), {"completion": "It is 2."})
    run.answers(0).parent.mkdir()
    for step in (0, 10):
        answer = {"text": f"{HOSTILE} {step}", "finish_reason": "length" if step else "stop", "num_tokens": 3}
        run.answers(step).write_text(json.dumps(asked.record() | {"part": "held-out", "answers": [answer]}) + "\n")
    open_report(tab, run)
    assert tab.complaints == []
    assert tab.run("document.title") != "broken"
    assert texts(tab, ".side h4") == ["Before (step 0)", "After (step 10)"]
    assert texts(tab, ".side .said") == [f"{HOSTILE} 0", f"{HOSTILE} 10"]
    assert texts(tab, ".side .state") == ["cut"]
    assert texts(tab, ".side .reward, #samples select") == []
    assert texts(tab, "#samples .verdict")[0].startswith("The likeliest answer to the first held-out rows")


def test_a_canvas_has_ink_in_both_schemes(tab: Tab, run: RunDir) -> None:
    """A chart that was drawn in the page's own colour would be empty to the eye."""
    count = """(() => { const canvas = document.querySelector('.chart canvas');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      let ink = 0; for (let at = 3; at < data.length; at += 4) ink += data[at] > 0; return ink; })()"""
    backgrounds = []
    for is_dark in (False, True):
        open_report(tab, run, is_dark=is_dark)
        assert tab.run(count) > 500
        backgrounds.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(246, 247, 249)", "rgb(16, 19, 25)"]


def test_texts_of_a_run_are_never_markup(tab: Tab, run: RunDir) -> None:
    open_report(tab, run)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.run("document.title").startswith(NAME)
    assert tab.run("document.querySelectorAll('img').length") == 0
    assert tab.run("document.querySelectorAll('script').length") == 2
    assert HOSTILE in texts(tab, ".detail .said")
    assert HOSTILE in texts(tab, ".detail .gold dd")


def test_a_script_that_got_in_would_not_run(tab: Tab, run: RunDir) -> None:
    """The policy names our script by its hash; an inline handler or another script is refused."""
    open_report(tab, run)
    image = "<img src=x onerror='top.bad = 1'>"
    tab.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(image)})")
    tab.run("document.body.append(Object.assign(document.createElement('script'), { textContent: 'top.bad = 1' }))")
    assert tab.run("top.bad === undefined")
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


def test_filters_and_keys_choose_prompts(tab: Tab, run: RunDir) -> None:
    open_report(tab, run)
    assert texts(tab, ".row .step") == ["step 1", "step 2"]
    tab.run("document.querySelector('.list').focus()")
    tab.press("ArrowDown")
    assert texts(tab, ".row[aria-selected=true] .step") == ["step 2"]
    assert texts(tab, ".detail .rollout .reward") == ["1", "failed"]
    choose(tab, 1, "failed")
    assert texts(tab, ".row .step") == ["step 2"]
    choose(tab, 0, "1")
    assert texts(tab, ".row") == []
    assert "No prompt matches" in texts(tab, ".detail")[0]


def test_axis_and_running_mean_redraw_without_complaint(tab: Tab, run: RunDir) -> None:
    open_report(tab, run)
    for word in ("time", "5", "step"):
        buttons = "[...document.querySelectorAll('.choice button')]"
        tab.run(f"{buttons}.find((each) => each.textContent === '{word}').click()")
    assert texts(tab, ".choice button[aria-pressed=true]") == ["step", "5"]
    assert tab.complaints == []


@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_no_wider_than_the_screen(tab: Tab, run: RunDir, width: int) -> None:
    open_report(tab, run, width=width)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") == width


def test_runs_are_overlaid_and_can_be_hidden(tab: Tab, run: RunDir, tmp_path: Path) -> None:
    other = open_run(make_plan(load_recipe(write_small(tmp_path, RFT), ["seed=3"])), "other")
    other.metrics_file.write_text('{"step": 1, "time": 3.0, "rollout/reward": 0.7}\n')
    open_report(tab, run, other)
    assert texts(tab, "tbody tr td")[:3] == ["seed", "0", "3"]
    legend = "document.querySelector('.chart .legend').textContent"
    assert "other 0.7" in tab.run(legend)
    tab.run("[...document.querySelectorAll('.runs button')].find((each) => each.textContent === 'other').click()")
    assert "other" not in tab.run(legend)
    assert tab.complaints == []


def test_live_page_shows_new_steps_and_other_hosts_are_refused(tab: Tab, run: RunDir) -> None:
    server = make_server(LiveReport([RunReporter(run, standing)]), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        tab.open(f"http://127.0.0.1:{server.server_port}/")
        with run.metrics_file.open("a") as file:
            file.write('{"step": 3, "time": 50.0, "rollout/reward": 0.625}\n')
        legend = "document.querySelector('.chart .legend').textContent"
        assert wait_until(lambda: "training 0.625" in tab.run(legend), timeout_s=20, poll_s=0.2)
        assert tab.complaints == []
        assert {url.partition("?")[0].rpartition("/")[2] for url in tab.requests} == {"", "data"}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("GET", "/data", headers={"Host": "attacker.example"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (403, b"this host name is not served")
        connection.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
