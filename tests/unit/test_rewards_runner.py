"""The reward runner: whatever a reward does, the other completions are scored and nothing is 0 by accident."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.config.rft_sections import RewardSpec
from trainer.errors import RewardError
from trainer.rewards.process import WorkerProcess
from trainer.rewards.runner import ALL_ABSTAINED, RewardRunner
from trainer.types import Row

REWARDS = '''
import ctypes, os, random, signal, subprocess, sys, time
from trainer.rewards.contract import Score, UnscoredBatchError

def obey(completion, row):
    """Do what the completion says."""
    match completion:
        case "raise": raise LookupError("no such thing")
        case "sleep": time.sleep(1000)
        case "children": subprocess.run(["sleep", "987"])
        case "deaf": ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
        case "exit": os._exit(3)
        case "sys.exit": sys.exit(0)
        case "segfault": ctypes.string_at(0)
        case "nan": return float("nan")
        case "inf": return float("inf")
        case "bad part": return Score(1.0, {"p": float("nan")})
        case "string": return "1.0"
        case "list": return [1.0]
        case "huge": return 10**400
        case "true": return True
        case "abstain": return None
        case "hoard": return float(len(bytearray(4 << 30)))
        case "recurse": return obey_deeper(completion)
        case "print": print("x" * 100_000); os.write(1, b"y" * 1000); sys.stdin.read(); return 1.0
        case "parts": return Score(0.5, {"form": 1.0})
        case "missing": return row["nothing"]
        case "wait":
            while not os.path.exists(row["file"]): time.sleep(0.01)
            return 1.0
        case "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
            return -float(subprocess.run(["sh", "-c", "kill -TERM $$"]).returncode)
        case "environment": return float("RANK" in os.environ) + 2.0 * (os.environ["OMP_NUM_THREADS"] == "1")
    return float(completion)

def obey_deeper(completion):
    return obey_deeper(completion)

def half(completion, row, *, scale=0.5):
    return scale

def pid(completion, row):
    return os.getpid()

def lengths(prompts, completions, answer, **columns):
    """A batch reward that dies of one completion."""
    if "poison" in completions:
        os._exit(1)
    return [len(completions) + float(a) for a in answer]

def texts(completions, **columns):
    return [float(len(c)) if isinstance(c, str) else 100.0 + len(c[0]["content"]) for c in completions]

def strict(completions, answer):
    return [1.0 if c == a else None for c, a in zip(completions, answer)]

def one_short(completions):
    return [1.0] * (len(completions) - 1)

def unreachable(completions, counter):
    with open(counter[0], "a") as file:
        file.write("x")
    raise UnscoredBatchError("the server is down")

async def later(completions, **columns):
    return [7.0 for _ in completions]
'''


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rewards")
    Path(directory, "mine.py").write_text(REWARDS)
    return directory


@pytest.fixture(scope="module")
def obey(base_dir):
    with RewardRunner(
        [RewardSpec(use="mine.py:obey")], base_dir=base_dir, timeout_s=1.0, memory_limit_gib=1.0
    ) as runner:
        yield runner


def rows(count, **fields):
    return [Row(fields, file="rows.jsonl", line=number + 1, index=number) for number in range(count)]


@pytest.mark.parametrize(
    ("completion", "what"),
    [
        ("raise", "LookupError: no such thing"),
        ("sleep", "no answer within 1 s"),
        ("deaf", "no answer within 1 s"),
        ("exit", "ended itself with status 3"),
        ("sys.exit", "SystemExit: 0"),
        ("segfault", "killed by SIGSEGV"),
        ("nan", "float nan, not finite"),
        ("inf", "float inf, not finite"),
        ("bad part", "not finite"),
        ("string", "returned str '1.0'"),
        ("list", "returned list [1.0]"),
        ("huge", "OverflowError"),
        ("hoard", "MemoryError"),
        ("recurse", "RecursionError"),
    ],
)
def test_a_bad_call_fails_alone_and_says_why(obey, completion, what):
    scored = obey.score(list(zip(["1.5", completion, "2.5"], rows(3), strict=True)))
    assert [each.reward for each in scored] == [1.5, None, 2.5]
    assert [each.failure is None for each in scored] == [True, False, True]
    assert scored[1].failure.startswith("reward obey: on rows.jsonl:2\n")
    assert what in scored[1].failure
    assert scored[1].rewards == {"obey": None}


def test_a_failure_names_the_line_of_the_reward(obey, base_dir):
    for completion in ("raise", "sleep", "segfault"):
        failure = obey.score([(completion, rows(1)[0])])[0].failure
        assert 'mine.py", line ' in failure
        assert "trainer/rewards" not in failure or completion != "raise"


def test_one_raise_in_fifty_costs_one_score(obey):
    completions = ["raise" if number == 17 else str(number) for number in range(50)]
    scored = obey.score(list(zip(completions, rows(50), strict=True)))
    assert [each.reward for each in scored] == [None if number == 17 else float(number) for number in range(50)]


def test_a_hang_ends_with_the_children_it_started(obey):
    assert obey.score([("children", rows(1)[0])])[0].reward is None
    time.sleep(0.1)
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x00987\x00" not in running


def test_what_a_reward_prints_corrupts_nothing(obey):
    assert [each.reward for each in obey.score([("print", rows(1)[0]), ("2", rows(1)[0])])] == [1.0, 2.0]


def test_true_is_one(obey):
    assert obey.score([("true", rows(1)[0])])[0].reward == 1.0


def test_parts_are_logged_beside_their_reward(obey):
    assert obey.score([("parts", rows(1)[0])])[0].rewards == {"obey": 0.5, "obey/form": 1.0}


def test_text_survives_that_is_no_unicode(obey):
    assert "ValueError" in obey.score([("half a pair \ud83d", rows(1)[0])])[0].failure


def test_a_stop_of_all_processes_is_no_failure_of_a_reward(obey):
    """As Slurm sends SIGTERM; a program that a reward started is still ended by it (15)."""
    (scored,) = obey.score([("stopped", rows(1)[0])])
    assert (scored.reward, scored.failure) == (15.0, None)


def test_a_stop_of_all_processes_while_a_worker_starts_is_no_failure(base_dir, tmp_path):
    spec = {"use": "mine.py:obey", "args": {}}
    setup = {"rewards": [spec], "base_dir": str(base_dir), "memory_limit_bytes": 1 << 30, "timeout_s": 1.0}
    process = WorkerProcess(setup, tmp_path)
    try:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGTERM)
        assert process.await_ready() == ["single"]
    finally:
        process.kill()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "this process can be stopped"


def test_a_worker_is_no_training_rank(obey, base_dir, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RewardRunner([RewardSpec(use="mine.py:obey")], base_dir=base_dir) as runner:
        assert runner.score([("environment", rows(1)[0])])[0].reward == 2.0


def test_rewards_are_summed_with_their_weights(base_dir):
    specs = [
        RewardSpec(use="mine.py:obey", weight=2.0),
        RewardSpec(use="mine.py:half", weight=-1.0, args={"scale": 0.25}, label="cost"),
    ]
    with RewardRunner(specs, base_dir=base_dir) as runner:
        scored = runner.score(list(zip(["3", "abstain", "raise"], rows(3), strict=True)))
    assert scored[0].reward == 2.0 * 3.0 - 0.25
    assert scored[0].rewards == {"obey": 3.0, "cost": 0.25}
    assert scored[1].reward == -0.25  # the weights that remain are as they were
    assert scored[1].rewards == {"obey": None, "cost": 0.25}
    assert scored[2].reward is None  # one failure leaves no sum, but the other reward is logged
    assert scored[2].rewards == {"obey": None, "cost": 0.25}


def test_no_reward_at_all_is_no_zero(obey):
    scored = obey.score([("abstain", rows(1)[0])])[0]
    assert (scored.reward, scored.failure) == (None, ALL_ABSTAINED)


def test_order_does_not_depend_on_the_number_of_workers(base_dir):
    items = list(zip([str(number) for number in range(40)], rows(40), strict=True))
    with RewardRunner([RewardSpec(use="mine.py:obey")], base_dir=base_dir, num_workers=2) as runner:
        assert [each.reward for each in runner.score(items)] == [float(number) for number in range(40)]


def test_two_workers_are_two_processes(base_dir):
    specs = [RewardSpec(use="mine.py:pid")]
    with RewardRunner(specs, base_dir=base_dir, num_workers=2) as runner:
        assert len({each.reward for each in runner.score(list(zip(["x"] * 200, rows(200), strict=True)))}) == 2


def test_scoring_goes_on_while_the_caller_works(base_dir, tmp_path):
    file = tmp_path / "written by the caller"
    with RewardRunner([RewardSpec(use="mine.py:obey")], base_dir=base_dir, timeout_s=20.0) as runner:
        scoring = runner.submit([("wait", rows(1, file=str(file))[0])])
        file.write_text("")  # a submit that waited for the reward would never get here in time
        assert scoring.result()[0].reward == 1.0


def test_closing_does_not_wait_for_a_reward_that_hangs(base_dir):
    start = time.monotonic()
    with RewardRunner([RewardSpec(use="mine.py:obey")], base_dir=base_dir, timeout_s=60.0) as runner:
        runner.submit([("sleep", rows(1)[0])])
        time.sleep(0.1)
    assert time.monotonic() - start < 5.0


def test_workers_end_with_a_parent_that_was_killed(base_dir, tmp_path):
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from trainer.config.rft_sections import RewardSpec
from trainer.rewards.runner import RewardRunner
from trainer.types import Row
specs = [RewardSpec(use="mine.py:pid"), RewardSpec(use="mine.py:obey")]
with RewardRunner(specs, base_dir=Path({str(base_dir)!r}), timeout_s=600) as runner:
    print(int(runner.score([("1", Row({{}}))])[0].rewards["pid"]), flush=True)
    runner.submit([("sleep", Row({{}}))])
    time.sleep(0.2)
    os._exit(9)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    worker = Path("/proc", done.stdout.strip())
    assert done.returncode == 9
    assert worker.name.isdigit()
    for _ in range(40):
        if not worker.exists():
            break
        time.sleep(0.1)
    assert not worker.exists()
    assert list(tmp_path.iterdir()) == []  # nor is anything left of their files


def test_a_batch_reward_sees_all_items_at_once(base_dir):
    with RewardRunner([RewardSpec(use="mine.py:lengths")], base_dir=base_dir, num_workers=2) as runner:
        scored = runner.score(list(zip(["a", "b", "c"], rows(3, answer="10"), strict=True)))
    assert [each.reward for each in scored] == [13.0, 13.0, 13.0]


def test_a_batch_that_dies_is_halved_until_the_culprit_is_alone(base_dir):
    with RewardRunner([RewardSpec(use="mine.py:lengths")], base_dir=base_dir) as runner:
        scored = runner.score(list(zip(["a", "b", "poison", "c"], rows(4, answer=0), strict=True)))
    assert [each.reward for each in scored] == [2.0, 2.0, None, 1.0]
    assert "rows.jsonl:3" in str(scored[2].failure)


def test_a_batch_without_a_culprit_is_not_tried_again(base_dir, tmp_path):
    counter = tmp_path / "calls"
    with RewardRunner([RewardSpec(use="mine.py:unreachable")], base_dir=base_dir) as runner:
        scored = runner.score(list(zip("abcd", rows(4, counter=str(counter)), strict=True)))
    assert all("the server is down" in str(each.failure) for each in scored)
    assert counter.read_text() == "x"


def test_a_batch_with_too_few_values_scores_nothing(base_dir):
    with RewardRunner([RewardSpec(use="mine.py:one_short")], base_dir=base_dir) as runner:
        scored = runner.score(list(zip("ab", rows(2), strict=True)))
    assert all("returned 0 values for 1 completions" in str(each.failure) for each in scored)


def test_a_batch_reward_takes_only_the_columns_it_names(base_dir):
    with RewardRunner([RewardSpec(use="mine.py:strict")], base_dir=base_dir) as runner:
        scored = runner.score([("a", Row({"answer": "a", "unit": "m"})), ("b", Row({"answer": "a", "unit": "m"}))])
    assert [each.reward for each in scored] == [1.0, None]


def test_completions_are_messages_where_the_row_has_messages(base_dir):
    talk = Row({"messages": [{"role": "user", "content": "Hi"}]})
    with RewardRunner([RewardSpec(use="mine.py:texts"), RewardSpec(use="mine.py:later")], base_dir=base_dir) as runner:
        scored = runner.score([("four", talk), ("four", Row({"prompt": "Hi"}))])
    assert [each.rewards["texts"] for each in scored] == [104.0, 4.0]
    assert [each.rewards["later"] for each in scored] == [7.0, 7.0]  # a coroutine function is awaited


def test_trl_rewards_work_unchanged(base_dir):
    pytest.importorskip("math_verify")
    specs = [
        RewardSpec(use="trl.rewards:accuracy_reward"),
        RewardSpec(use="trl.rewards:think_format_reward", weight=0.5),
    ]
    row = Row({"messages": [{"role": "user", "content": "Half of 1?"}], "solution": r"\frac{1}{2}"})
    texts = ["<think>\nhm\n</think>\n\\boxed{0.5}", r"\boxed{\frac{1}{2}}", r"<think>\boxed{3}</think>", "no"]
    with RewardRunner(specs, base_dir=base_dir, timeout_s=60.0) as runner:
        scored = runner.score([(text, row) for text in texts])
    assert [each.reward for each in scored] == [1.5, 1.0, 0.5, 0.0]


def test_a_reward_that_cannot_be_loaded_stops_before_the_first_score(base_dir):
    runner = RewardRunner([RewardSpec(use="mine.py:obeyy")], base_dir=base_dir)
    with pytest.raises(RewardError, match="did you mean `obey`"), runner:
        pass


def test_two_rewards_of_one_name_are_refused(base_dir):
    with pytest.raises(RewardError, match="two are called 'obey'"):
        RewardRunner([RewardSpec(use="mine.py:obey"), RewardSpec(use="mine.py:obey")], base_dir=base_dir)


def test_a_runner_never_imports_torch():
    script = (
        "import sys, trainer.rewards.runner, trainer.rewards.dry_run, trainer.rewards.worker;"
        "print([name for name in ('torch', 'transformers', 'trl', 'jsonschema', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "[]\n"
