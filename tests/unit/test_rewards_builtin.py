"""Built-in rewards on the texts that models really write."""

import http.server
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from trainer.config.rft_sections import RewardSpec
from trainer.errors import RewardError
from trainer.rewards.builtin.last_number import check_row as check_number
from trainer.rewards.builtin.last_number import find_last_number, last_number
from trainer.rewards.builtin.length import soft_overlong
from trainer.rewards.builtin.structured import find_document, json_schema
from trainer.rewards.builtin.text import exact_match, regex_match
from trainer.rewards.contract import Score
from trainer.rewards.runner import RewardRunner
from trainer.types import Row

SERVER = Path(__file__).parents[2] / "docs" / "examples" / "reward_server.py"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,250.50", "1250.50"),
        ("1{,}250", "1250"),  # LaTeX
        ("$-1,000", "-1000"),
        ("12,3456", "3456"),  # no thousands: two numbers
        ("1,2", "2"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("x=-3", "-3"),
        ("\u22127.5%", "-7.5"),  # the sign that typesetters use
        ("3-5", "5"),
        ("3 - 5", "5"),
        ("10-", "10"),
        ("The end is 5.", "5"),
        ("-.5", "-0.5"),
        ("1..5", "5"),
        ("**42**", "42"),
        ("1/3", "3"),
        ("2e3.", "2000"),
        ("2e3x", "3"),
        ("5^5^5^5", "5"),
        ("\u0663", None),  # an Arabic-Indic digit is no number here
        ("", None),
        ("-", None),
        (".", None),
    ],
)
def test_last_number_reads(text, number):
    assert find_last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{1,\!234}", "1234"),
        (r"1\,234\,567", "1234567"),
        ("1\u202f234", "1234"),
        (r"1\,2", "2"),  # no thousands
        ("It is -$5.", "-5"),
        (r"-\$1,000", "-1000"),
        ("x = \u2013 5", "-5"),
        ("pages 3\u20135", "5"),
        ("- 5", "-5"),
        ("x = - 5", "-5"),
        ("The answer is - 5.", "-5"),
        ("8 - 5", "5"),
        ("- 3 apples\n- 5 pears", "5"),  # bullets
        ("Take x - 5", "5"),
    ],
)
def test_last_number_reads_signs_and_thousands_of_typesetters(text, number):
    assert find_last_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "answer",
    [
        r"\frac{3}{4}", "3/8", "x^2", "[1, 5)", "2x", "3 and 4", "1,2", "", None, True, "five", "1 234 567 8", [5],
        r"\frac{3}{4} #### x", "nan",
    ],
)  # fmt: skip
def test_an_answer_that_is_no_number_is_refused(answer):
    with pytest.raises(ValueError, match=r"rows.jsonl:3: answer is not a number"):
        check_number(Row({"answer": answer}, "rows.jsonl", 3))


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("$1,250", "1250"), ("-5", "-5"), ("50%", "50"), (r"\boxed{7}", "7"), ("$7$", "7"), ("\u22125", "-5"),
        (7, "7.0"), (0.5, ".50"), ("7.", "7"), ("-$3.50", "-3.5"), ("so 3/8\n#### 1,000", "1000"), ("1e3", "1000"),
    ],
)  # fmt: skip
def test_answers_that_are_one_number_are_read(answer, completion):
    assert last_number(completion, {"answer": answer}) == 1.0


def test_last_number_is_as_fast_on_100_kb_as_it_should_be():
    start = time.monotonic()
    for text in ("1" * 100_000, "-" * 100_000, "1," * 50_000, "111," * 25_000 + "x", "1e" * 50_000, "." * 100_000):
        last_number(text, {"answer": 1})
    assert time.monotonic() - start < 2.0


def test_last_number_of_gsm8k_answers():
    assert last_number("so 48+24 = 72", {"answer": "He sold 48/2 = <<48/2=24>>24.\n#### 72"}) == 1.0


def test_last_number_within_a_tolerance():
    assert last_number("0.333", {"answer": "0.3333"}, tolerance=0.001) == 1.0
    assert last_number("0.33", {"answer": "0.3333"}, tolerance=0.001) == 0.0
    assert last_number("1e999999", {"answer": "1"}, tolerance=0.001) == 0.0


def test_last_number_behind_a_mark():
    assert last_number("#### 5 (or 6)", {"answer": 6}, after="####") == 1.0
    assert last_number("5", {"answer": 5}, after="####") == 0.0


def test_an_answer_without_number_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match=r"rows.jsonl:3: answer is not a number: 'five'"):
        last_number("5", Row({"answer": "five"}, "rows.jsonl", 3))


@pytest.mark.parametrize("reward", [last_number, exact_match])
@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>\n4\n</think>\n5", 0.0),
        ("<think>\n5\n</think>\n4", 1.0),
        ("it is 5</think>4", 1.0),  # the template wrote the opening
        ("<think>\nit is\n4", 0.0),  # cut off
    ],
)
def test_thinking_holds_no_answer(reward, completion, score):
    assert reward(completion, {"answer": "4"}) == score


def test_exact_match_reads_accents_in_either_form():
    assert exact_match("cafe\u0301", {"answer": "caf\u00e9"}) == 1.0
    assert exact_match("cafe", {"answer": "caf\u00e9"}) == 0.0


@pytest.mark.parametrize("answer", [True, ["yes", False], "", " \n", ["Paris", ""]])
def test_exact_match_refuses_answers_that_mean_something_else(answer):
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: answer is"):
        exact_match("True", Row({"answer": answer}, "rows.jsonl", 3))


def test_exact_match_forgives_space_only():
    assert exact_match(" New \n York ", {"answer": "New York"}) == 1.0
    assert exact_match("NewYork", {"answer": "New York"}) == 0.0
    assert exact_match("4", {"answer": 4}) == 1.0
    assert exact_match("no mark", {"answer": "no mark"}, after="Answer:") == 0.0


@pytest.mark.parametrize("answer", [None, [], ["a", None], {"a": 1}])
def test_exact_match_refuses_a_row_without_an_answer(answer):
    with pytest.raises(ValueError, match=r"rows.jsonl:3: answer must be a text"):
        exact_match("None", Row({"answer": answer}, "rows.jsonl", 3))


def test_regex_match_wants_the_whole_text():
    assert regex_match("<a>1</a> and more", {}, pattern=r"<a>.*</a>") == 0.0
    assert regex_match("<a>\n1</a>\n", {}, pattern=r"<a>.*</a>") == 1.0


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"n": 1, "s": "a"}', 1.0),
        ('Sure:\n```json\n{"n": 1, "s": "a"}\n```', 1.0),
        ('{"n": 1, "s": "b"}', 0.75),
        ('{"n": 2}', 0.5),  # valid, but nothing is right
        ('{"n": true, "s": "a"}', 0.0),  # true is no integer
        ('{"s": "a"}', 0.0),  # right, but invalid
        ('[{"n": 1, "s": "a"}]', 1.0),  # the first object, wherever it stands
        ('{"n": 1, "s": "a"', 0.0),
        ("", 0.0),
    ],
)
def test_json_schema_and_expected_fields(completion, value):
    row = {"schema": SCHEMA, "expected": {"n": 1, "s": "a"}}
    assert json_schema(completion, row, expected_field="expected").value == value


AGE = {
    "type": "object",
    "required": ["age"],
    "properties": {"age": {"type": "number", "minimum": 0, "maximum": 150}},
}
TREE = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
}
IDS = {"type": "array", "items": {"type": "object", "required": ["id"]}}


@pytest.mark.parametrize(
    ("schema", "completion", "value"),
    [
        (AGE, '{"age": NaN}', 0.0),
        (AGE, '{"age": Infinity}', 0.0),
        (AGE, '<think>maybe {"age":"?"}</think>{"age": 3}', 1.0),
        (AGE, '<think>{"age": 3}', 0.0),
        (AGE, "{ or { " * 200 + '{"age": 3}', 1.0),
        (AGE, 'Set {x} and {"age": 3}.', 1.0),
        (AGE, '{"age": oops} but {"age": 3}', 1.0),
        (AGE, '{"age": "{\\"age\\": 3}"}', 0.0),  # a string that holds one
        (TREE, '{"name":"root","children":[{"name":"a"},{"name":"b"', 0.0),
        (TREE, '{"title":"root","children":[{"name":"a"}]}', 0.0),
        (TREE, '{"name":"root","children":[{"name":"a"}]}', 1.0),
        (IDS, '[{"id":1},{"id":2}]', 1.0),
        (IDS, '[{"id":1},{"id":2}', 0.0),
        (IDS, '[{"id":1},{"no":2}]', 0.0),
        (IDS, 'Here: [{"id":1}]', 1.0),
        ({"type": "string", "enum": ["yes"]}, '"yes"', 1.0),
        ({"type": "string", "enum": ["yes"]}, '```json\n"yes"\n```', 1.0),
        ({"type": "string", "enum": ["yes"]}, '"no"', 0.0),
        ({"type": "integer"}, "4", 1.0),
        ({"anyOf": [{"type": "null"}, AGE]}, "null", 1.0),
        ({"anyOf": [{"type": "null"}, AGE]}, 'So {"age": 3}', 1.0),
    ],
)
def test_json_schema_takes_whole_documents_only(schema, completion, value):
    assert json_schema(completion, {}, schema=schema).value == value


def test_a_remote_schema_is_never_fetched():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        with pytest.raises(ValueError, match="nothing is fetched"):
            json_schema('{"a": 1}', Row({}, "rows.jsonl", 3), schema={"type": "object", "$ref": url})
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody connected
            server.accept()


def test_a_schema_may_be_text_or_an_argument():
    assert json_schema('{"n": 1}', {"schema": json.dumps(SCHEMA)}) == Score(1.0)
    assert json_schema('{"n": 1}', {}, schema=SCHEMA) == Score(1.0)


@pytest.mark.parametrize("text", ["{" * 100_000, '{"a":' * 20_000, '{"a": ' + "9" * 100_000 + "}", '{"a": [' * 15_000])
def test_hostile_json_costs_little_and_scores_nothing(text):
    start = time.monotonic()
    assert find_document(text, frozenset({"object"})) == (None, False)
    assert time.monotonic() - start < 2.0


def test_soft_overlong_of_the_paper():
    lengths = (0, 60, 80, 85, 99, 100, 101, 10_000)
    rewards = [soft_overlong("x" * length, {}, max_characters=100, ramp_characters=20) for length in lengths]
    assert rewards == [0.0, 0.0, 0.0, -0.25, -0.95, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so \boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"so \boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"thus $x^2-1$", "(x-1)(x+1)", 1.0),
        (r"\boxed{3}", 4, 0.0),
        (r"\boxed{3} wait, \boxed{4}", "4", 1.0),
        (r"\boxed{4} wait, \boxed{3}", "4", 0.0),
        (r"\boxed{4} wait, \boxed{\frac{1}{2}}", "1/2", 1.0),
        ("", "4", 0.0),
        (r"<think>\boxed{4}</think> \boxed{5}", "4", 0.0),
        (r"<think>\boxed{5}</think> \boxed{4}", "4", 1.0),
        (r"<think>so \boxed{4}", "4", 0.0),
    ],
)
def test_math_verify_compares_expressions(completion, answer, reward):
    pytest.importorskip("math_verify")
    from trainer.rewards.builtin.mathematics import math_verify

    assert math_verify(completion, {"answer": answer}) == reward


def test_a_tower_of_powers_stops_nobody_else(tmp_path):
    pytest.importorskip("math_verify")
    texts = [r"\boxed{4}", r"\boxed{5^{5^{5^5}}}", r"\boxed{5}"]
    (tmp_path / "power.py").write_text("def power(completion, row): return float(5**5**5**5)\n")
    specs = [RewardSpec(use="math_verify"), RewardSpec(use="power.py:power")]
    row = Row({"answer": "4"})
    with RewardRunner(specs[:1], base_dir=tmp_path, timeout_s=2.0) as runner:
        rewards = [each.reward for each in runner.score([(text, row) for text in texts])]
    assert (rewards[0], rewards[2]) == (1.0, 0.0)
    assert rewards[1] in (None, 0.0)  # never equal to 4, however the library goes about it
    with RewardRunner(specs[1:], base_dir=tmp_path, timeout_s=0.5) as runner:
        assert "no answer within 0.5 s" in str(runner.score([("x", row)])[0].failure)


@pytest.fixture
def example_server():
    """The server of the documentation, started as its first line says, on a free port."""
    command = [sys.executable, str(SERVER), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


@pytest.fixture
def moody_server():
    """The example's handler, which first answers what `moods` says; None is its own answer."""
    spec = importlib.util.spec_from_file_location("reward_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    moods: list[Any] = []

    class Moody(example.RewardHandler):
        def do_POST(self):
            mood = moods.pop(0) if moods else None
            if mood is None:
                super().do_POST()
            else:
                self.answer(*mood)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", moods
        server.shutdown()
        thread.join()


def test_the_example_server_rewards_a_batch(example_server, tmp_path):
    specs = [RewardSpec(use="http_reward", args={"url": example_server})]
    talk = Row({"messages": [{"role": "user", "content": "2+2?"}], "answer": 4})
    with RewardRunner(specs, base_dir=tmp_path) as runner:
        scored = runner.score([("It is 4.", talk), ("It is 5.", talk), ("4", Row({"prompt": "2+2?", "answer": None}))])
    assert [each.rewards["http_reward"] for each in scored] == [1.0, 0.0, None]


def posted(url, texts, **args):
    """What an `http_reward` without patience makes of completions to the answer 4."""
    spec = RewardSpec(use="http_reward", args={"url": url, "on_outage": "fail", **args})
    with RewardRunner([spec], base_dir=Path()) as runner:
        return runner.score([(text, Row({"answer": 4})) for text in texts])


def test_a_server_that_stumbles_is_asked_again(moody_server):
    url, moods = moody_server
    moods[:] = [(500, {"error": "warming up"}), (429, {})]
    assert posted(url, ["a 4"])[0].reward == 1.0
    assert moods == []


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_proxies_of_the_environment_are_not_used(moody_server, monkeypatch, name):
    url, _ = moody_server
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    assert posted(url, ["a 4"], num_retries=0)[0].reward == 1.0


def test_a_request_that_is_wrong_is_not_repeated(moody_server):
    url, moods = moody_server
    moods[:] = [(404, {"error": "no such path"}), (500, {})]
    failure = str(posted(url, ["a 4"])[0].failure)
    assert "HTTP 404" in failure
    assert "no such path" in failure
    assert len(moods) == 1


@pytest.mark.parametrize("answer", [{"rewards": [1.0]}, {"reward": 1.0}, [1.0, 1.0]])
def test_an_answer_of_another_form_scores_nothing(moody_server, answer):
    url, moods = moody_server
    moods[:] = [(200, answer)]
    scored = posted(url, ["a", "b"])
    assert [each.reward for each in scored] == [None, None]
    assert "must answer" in str(scored[0].failure)


def test_a_server_may_fail_one_completion(moody_server, tmp_path):
    url, moods = moody_server
    moods[:] = [(200, {"rewards": [1.0, "no judge", 0.5]})]
    with RewardRunner([RewardSpec(use="http_reward", args={"url": url})], base_dir=tmp_path) as runner:
        scored = runner.score([(text, Row({})) for text in "abc"])
    assert [each.reward for each in scored] == [1.0, None, 0.5]
    assert "'no judge'" in str(scored[1].failure)


def test_a_server_that_is_not_there_fails_the_batch_at_once():
    scored = posted("http://127.0.0.1:9", ["c", "d"], num_retries=1)
    assert all("ConnectError" in str(each.failure) for each in scored)
    with pytest.raises(RewardError, match="must begin with http"):
        posted("file:///etc/passwd", ["c"])
