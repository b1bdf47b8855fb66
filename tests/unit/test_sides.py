"""The two sides of benchmarks/compare.py: real processes with their own thread settings, that alternate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from compare import best_rate, rft_lines, sft_lines, steps_per_s
from sides import POLICIES, Side, alternate, best_policy

SCRIPT = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from sides import serve

side, log = sys.argv[2], sys.argv[3]
spin = int(os.environ.get("GOMP_SPINCOUNT", "0"))
print("a library says something")

def measure():
    with open(log, "a") as file:
        print(side, os.environ["OMP_NUM_THREADS"], spin, os.environ.get("OMP_WAIT_POLICY", "-"), file=file)
    return {{side: float(spin if side == "trl" else 10 + (spin == 2000))}}

serve({{"side": side, "threads": int(os.environ["OMP_NUM_THREADS"])}}, measure)
"""
SPINNING, SLEEPING = "idle threads spin 200,000 times", "idle threads sleep at once"


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "script.py"
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    file.write_text(SCRIPT.format(benchmarks=str(benchmarks)))
    return str(file)


def rounds_of(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()]


def test_a_side_has_the_threads_and_the_policy_it_is_given(script, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_WAIT_POLICY", "PASSIVE")
    log = tmp_path / "log"
    with Side(script, "trl", [str(log)], 3, POLICIES[SPINNING]) as side:
        assert side.conditions == {"side": "trl", "threads": 3}
        assert side.measure() == {"trl": 200000.0}
    # a first round that is not measured, and ours; the variable of this process is not handed on
    assert rounds_of(log) == [["trl", "3", "200000", "-"]] * 2


def test_each_side_runs_under_the_policy_that_is_best_for_it(script, tmp_path):
    log = tmp_path / "log"
    found = alternate(script, [str(log)], 2, 3, best_rate)
    assert found["policies"] == {"ours": "idle threads spin 2,000 times", "trl": SPINNING}
    assert found["trials"]["trl"] == {SLEEPING: 0.0, "idle threads spin 2,000 times": 2000.0, SPINNING: 200000.0}
    assert found["rounds"] == {"ours": [{"ours": 11.0}] * 3, "trl": [{"trl": 200000.0}] * 3}
    measured = [each[0] for each in rounds_of(log)[-6:]]
    assert measured == ["ours", "trl", "trl", "ours", "ours", "trl"], "the order alternates"


def test_with_one_thread_there_is_nothing_to_choose(script, tmp_path):
    assert best_policy(script, "ours", [str(tmp_path / "log")], 1, best_rate) == ("one thread", {"one thread": 10.0})


def test_policies_that_are_given_are_not_tried_again(script, tmp_path):
    log = tmp_path / "log"
    found = alternate(script, [str(log)], 2, 1, best_rate, {"ours": SLEEPING, "trl": SPINNING})
    assert found["trials"] == {}
    assert len(rounds_of(log)) == 4


def test_a_side_that_ends_is_an_error_with_its_command(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"broken.py --serve ours .*ended with 3"):
        Side(str(file), "ours", ["-"], 1, {})


CONDITIONS = {"processor": "P", "amx": False, "torch": "2", "trl": "1", "bf16_peak_gflops": 200}


def sides(threads: int, ours: list[Any], trl: list[Any]) -> dict[str, Any]:
    policies = {"ours": SLEEPING, "trl": SPINNING}
    rounds = {"ours": ours, "trl": trl}
    return {"threads": threads, "policies": policies, "conditions": CONDITIONS, "did_not_run": {}, "rounds": rounds}


def test_tables_show_both_numbers_of_threads_and_the_best_of_trl():
    one = sides(1, [{"tunesmith": 240.0}, {"tunesmith": 260.0}], [{"a": 100.0, "b": 50.0}, {"a": 100.0, "b": 50.0}])
    two = sides(2, [{"tunesmith": 480.0}], [{"a": 150.0, "b": 160.0}])
    text = "\n".join(sft_lines(json.loads(json.dumps({"sides": [one, two]}))))
    assert f"| 2 | b | {SPINNING} | 160 |" in text
    assert "**2.50x** with one thread, **3.00x** with 2 threads." in text
    rounds = [[{"steps": [[10.0, 500.0]]}, {"steps": [[12.0, 500.0]]}], [{"steps": [[77.0, 500.0]]}]]
    text = "\n".join(rft_lines({"sides": [sides(2, *rounds)], "arguments": ["--steps", "1"]}))
    assert f"| 2 | tunesmith | {SLEEPING} | 11.0 | 45 |" in text
    assert "**7.00x** with 2 threads." in text
    assert steps_per_s(rounds[0][0]) == 0.1
