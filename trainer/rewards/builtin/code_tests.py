"""Reward code that passes its tests, run in a sandbox (`trainer.rewards.sandbox`)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, final

from trainer.rewards.builtin.answers import after_thinking, python_blocks
from trainer.rewards.contract import TIME_LIMIT, Score
from trainer.rewards.sandbox.client import Sandbox
from trainer.rewards.sandbox.remote import RemoteSandbox
from trainer.types import Row, read_field

BUDGET_FRAC: Final = 0.8
"""Part of the reward's time limit that all tests of a completion may take together."""
DEFAULT_BUDGET_S: Final = 8.0


def code_tests(  # noqa: PLR0913 - each is an argument of the recipe
    completion: str,
    row: Row,
    *,
    field: str = "tests",
    block: str = "last",
    partial: bool = False,
    run_timeout_s: float = 4.0,
    memory_mib: int = 512,
    allow_weak_sandbox: bool = False,
    sandbox_url: str | None = None,
) -> Score:
    """1.0 if the last Python block of the completion passes all of `row["tests"]`, else 0.0.

    >>> answer = "```python" + chr(10) + "def double(x):" + chr(10) + "    return 2 * x" + chr(10) + "```"
    >>> code_tests(answer, {"tests": ["assert double(2) == 4", "assert double(0) == 0"]}).value
    1.0
    >>> code_tests("double = abs", {"tests": ["assert double(2) == 4"]}).value
    0.0

    The code is what a fenced block behind the thinking holds; blocks labelled as Python go before blocks without a
    label. Tests have one of these forms, also as JSON text:

    - a list of statements that must not raise: `["assert double(2) == 4"]`;
    - a list of programs: `[{"input": "1 2", "output": "3"}]`: the code runs with the input on standard input;
    - TACO, APPS and Codeforces: `{"inputs": [...], "outputs": [...]}`, or `input` and `output`; with `fn_name` the
      function is called with each input's arguments.

    What a program prints on standard output is compared line by line without space at the ends of lines and of the
    text; a token that is expected as a decimal fraction is compared by its value, so 0.5 equals 0.50. Code that hangs,
    crashes or does what the sandbox refuses has failed its test: 0.0, and not a failed reward. All tests together have
    four fifths of `reward_limits.timeout_s`. Testing ends at the first failure, unless `partial`.

    The sandbox (docs/rewards.md) has no network, starts no process and writes into a temporary directory only. It needs
    seccomp (Linux on x86-64 or arm64); elsewhere the reward fails, unless you accept limits and an audit hook alone.

    Args:
        completion: what the model wrote.
        row: holds the tests.
        field: the row's field with the tests.
        block: which block is the answer: `last`, `first`, or `after MARK`: the first one behind the last MARK.
        partial: return the share of the tests that passed instead.
        run_timeout_s: wall-clock and CPU limit of one process; statements and calls share one.
        memory_mib: address space of the process.
        allow_weak_sandbox: whether to run without seccomp.
        sandbox_url: a server that runs the code instead, see `trainer.rewards.sandbox.remote`.
    """
    tests = read_tests(row, field)
    code = find_code(completion, block)
    if code is None:
        return Score(0.0, {"passed": 0.0})
    sandbox: Sandbox | RemoteSandbox = Sandbox(memory_mib << 20, allow_weak_sandbox, partial)
    if sandbox_url is not None:
        sandbox = RemoteSandbox(sandbox_url, memory_mib << 20, partial)
    end = time.monotonic() + BUDGET_FRAC * float(os.environ.get(TIME_LIMIT, DEFAULT_BUDGET_S / BUDGET_FRAC))

    def remaining_s() -> float:
        return min(run_timeout_s, end - time.monotonic())

    num_passed = 0
    if tests.in_process:
        num_passed += sandbox.run(code, tests=tests.in_process, timeout_s=remaining_s()).num_passed
    if partial or num_passed == len(tests.in_process):
        for program in tests.programs:
            timeout_s = remaining_s()
            ran = sandbox.run(code, text=program.input, timeout_s=timeout_s) if timeout_s > 0 else None
            is_passed = ran is not None and ran.has_ended and is_same_output(ran.printed, program.output)
            num_passed += is_passed
            if not is_passed and not partial:
                break
    share = num_passed / len(tests)
    return Score(share if partial else float(share == 1.0), {"passed": share})


def check_row(row: Row, *, field: str = "tests", **_: Any) -> None:
    """Refuse a row whose tests cannot be read.

    Raises:
        ValueError: names the row and what is wrong.
    """
    read_tests(row, field)


def find_code(completion: str, block: str) -> str | None:
    """Return the code of the answer; None where there is none.

    Args:
        completion: what the model wrote.
        block: as for `code_tests`.

    Raises:
        ValueError: `block` is none of the three.
    """
    text = after_thinking(completion)
    which, _, mark = block.partition(" ")
    if which == "after" and mark:
        _, found, text = text.rpartition(mark)
        text = text if found else ""
    elif block not in ("last", "first"):
        raise ValueError(f"code_tests: block must be `last`, `first` or `after MARK`, not {block!r}")
    blocks = python_blocks(text)
    if not blocks:
        return None
    return blocks[-1 if which == "last" else 0]


@final
@dataclass(frozen=True)
class Program:
    """A run on standard input."""

    input: str
    output: str


@final
@dataclass(frozen=True)
class Tests:
    """The tests of a row."""

    in_process: tuple[Mapping[str, Any], ...]
    """Statements and calls, see `sandbox.harness.run_test`."""
    programs: tuple[Program, ...]

    def __len__(self) -> int:
        return len(self.in_process) + len(self.programs)


def read_tests(row: Row, field: str) -> Tests:
    """Read a row's tests.

    Raises:
        ValueError: they have none of the known forms; names the row.
    """
    found = read_field(row, field)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            raise ValueError(f"{row}: {field} is text, but not JSON: {found!r:.80}") from None
    tests: list[Mapping[str, Any] | Program] = []
    for test in [found] if isinstance(found, Mapping) else found if isinstance(found, list) else []:
        tests += _of_one(test, row, field)
    if not tests:
        raise ValueError(f"{row}: {field} must be a list of tests, not {found!r:.200}")
    calls = tuple(test for test in tests if not isinstance(test, Program))
    return Tests(calls, tuple(test for test in tests if isinstance(test, Program)))


def _of_one(test: Any, row: Row, field: str) -> Iterator[Mapping[str, Any] | Program]:
    """The tests of one entry: a statement, a program, or parallel lists of inputs and outputs."""
    if isinstance(test, str):
        yield {"statement": test}
        return
    names = ("inputs", "outputs") if isinstance(test, Mapping) and "inputs" in test else ("input", "output")
    if not isinstance(test, Mapping) or not all(name in test for name in names):
        raise ValueError(f"{row}: {field}: a test is a statement, or has `input` and `output`; got {test!r:.200}")
    inputs, outputs = (test[name] for name in names)
    function = test.get("fn_name") or test.get("func_name")
    if test.get("testtype") == "functional" and function is None:
        raise ValueError(f"{row}: {field}: a functional test needs the function's name as `fn_name`; got {test!r:.200}")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        inputs, outputs = [inputs], [outputs]
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{row}: {field}: {len(inputs)} inputs, but {len(outputs)} outputs")
    for given, wanted in zip(inputs, outputs, strict=True):
        if function is not None:
            yield {"call": function, "args": _arguments(given, row, field), "result": _value(wanted)}
        else:
            yield Program(_text(given, row, field), _text(wanted, row, field))


def _arguments(given: Any, row: Row, field: str) -> list[Any]:
    """A call's arguments: a list, or text with one JSON value a line (LiveCodeBench)."""
    if isinstance(given, list):
        return given
    if isinstance(given, str):
        try:
            return [json.loads(line) for line in given.splitlines() if line.strip()]
        except ValueError:
            pass
    raise ValueError(f"{row}: {field}: arguments must be a list, or one JSON value a line; got {given!r:.200}")


def _value(wanted: Any) -> Any:
    try:
        return json.loads(wanted) if isinstance(wanted, str) else wanted
    except ValueError:
        return wanted


def _text(given: Any, row: Row, field: str) -> str:
    """What is on standard input or output: text, or a list of lines."""
    if isinstance(given, list) and all(isinstance(line, str) for line in given):
        return "\n".join(given)
    if not isinstance(given, str):
        raise ValueError(f"{row}: {field}: input and output must be texts or lists of lines; got {given!r:.200}")
    return given


def is_same_output(printed: str, expected: str) -> bool:
    r"""Whether a program printed what was expected.

    >>> is_same_output("0.5\n", "0.50"), is_same_output("7", "007"), is_same_output("1 2 \n", "1 2")
    (True, False, True)
    """
    lines, wanted = (_lines(text) for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_is_same_line, lines, wanted))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _is_same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    tokens, expected = line.split(), wanted.split()
    return len(tokens) == len(expected) and all(map(_is_same_token, tokens, expected))


def _is_same_token(token: str, expected: str) -> bool:
    if token == expected:
        return True
    if "." not in expected:
        return False
    try:
        return Decimal(token) == Decimal(expected)
    except InvalidOperation:
        return False
