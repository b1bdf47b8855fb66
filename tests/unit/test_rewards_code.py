"""code_tests: what passes is rewarded, and model-written code reaches nothing outside its directory."""

import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.config.recipe import RewardSpec
from trainer.rewards.builtin import sandbox
from trainer.rewards.builtin.code_tests import code_tests
from trainer.rewards.runner import RewardRunner
from trainer.types import Row

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox.ARCHITECTURES, reason="needs seccomp"
)


def block(code):
    return f"Here you are:\n```python\n{code}\n```\nIt works."


def passed(code, *tests, **args):
    return code_tests(block(code), {"tests": list(tests)}, run_timeout_s=2.0, **args).value


DOUBLE = "def double(x):\n    return 2 * x if x < 10 else 0"


def test_all_tests_must_pass():
    assert passed(DOUBLE, "assert double(2) == 4", "assert double(3) == 6") == 1.0
    assert passed(DOUBLE, "assert double(2) == 4", "assert double(20) == 40") == 0.0
    assert passed(DOUBLE, "assert double(2) == 4", "assert double(20) == 40", partial=True) == 0.5


def test_programs_are_compared_by_what_they_print():
    program = "n = int(input())\nprint(n * 2)\nexit()"
    assert passed(program, {"input": "4\n", "output": "8"}, {"input": "5", "output": "10 \n"}) == 1.0
    assert passed(program, {"input": "4\n", "output": "9"}) == 0.0
    assert passed("print(sum(map(int, open(0).read().split())))", {"input": "1 2 3", "output": "6"}) == 1.0
    assert passed("print(8)\nraise ValueError", {"input": "", "output": "8"}) == 0.0  # printed, then failed


def test_text_without_a_python_block_passes_nothing():
    assert code_tests(DOUBLE, {"tests": ["pass"]}).value == 0.0
    assert code_tests(f"```js\n{DOUBLE}\n```", {"tests": ["pass"]}).value == 0.0


def test_a_row_without_tests_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match="tests must be a list of tests"):
        code_tests(block(DOUBLE), {"tests": []})


def test_leaving_early_passes_nothing():
    for escape in ("import os; os._exit(0)", "import sys; sys.exit(0)", "print('passed 0')"):
        assert passed(escape, "assert False") == 0.0


def test_ordinary_code_runs():
    code = (
        "from __future__ import annotations\nimport collections, dataclasses, itertools, json, math, re, typing\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "with open('scratch', 'w') as file:\n    file.write('here')\n"
        "if __name__ == '__main__':\n    input('never asked')\n"
    )
    assert passed(code, "assert Point(3).x == 3", "assert open('scratch').read() == 'here'") == 1.0


def test_an_endless_loop_ends():
    start = time.monotonic()
    assert passed("while True:\n    pass", "pass") == 0.0
    assert passed("import time\ntime.sleep(1000)", "pass") == 0.0
    assert time.monotonic() - start < 10.0


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
        "import os\nwhile True:\n    os.fork()",
        "import threading\nwhile True:\n    threading.Thread(target=input).start()",
        "import subprocess\nsubprocess.run(['touch', '{outside}'])",
        "open('{outside}', 'w')",
        "import os\nos.remove('{victim}')",
        "import os\nos.chmod('{victim}', 0)",
        "import os\nos.kill(os.getppid(), 9)",
        "import ctypes\nctypes.CDLL(None)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "x = bytearray(1 << 30)",
        "open('big', 'wb').write(bytes(100 << 20))",
    ],
)
def test_the_sandbox_refuses(code, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"port": server.getsockname()[1], "outside": tmp_path / "outside", "victim": victim}
        for name, value in names.items():
            code = code.replace(f"{{{name}}}", str(value))
        assert passed(code, "pass") == 0.0
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody connected
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "kept"


def test_the_kernel_refuses_also_what_the_audit_hook_does_not_see(tmp_path):
    """The fences without the hook, which code could get around."""
    (tmp_path / "work").mkdir()
    (tmp_path / "victim").write_text("kept")
    script = f"""
import ctypes, os, socket, sys, threading
from trainer.rewards.builtin import sandbox
libc = ctypes.CDLL(None)
libc.prctl(sandbox.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
fences = [sandbox.refuse_writes_outside(libc, {str(tmp_path / "work")!r}), sandbox.refuse_system_calls(libc)]
def attempt(name, call):
    try:
        call()
    except (OSError, RuntimeError):
        print("refused", name)
    else:
        print("allowed", name)
attempt("socket", socket.socket)
attempt("fork", os.fork)
attempt("thread", lambda: threading.Thread(target=print).start())
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("chmod", lambda: os.chmod({str(tmp_path)!r}, 0o777))
attempt("setsid", os.setsid)
if fences[0]:
    attempt("write", lambda: open({str(tmp_path / "outside")!r}, "w"))
    attempt("truncate", lambda: os.truncate({str(tmp_path / "victim")!r}, 0))
    attempt("remove", lambda: os.remove({str(tmp_path / "victim")!r}))
attempt("work", lambda: open({str(tmp_path / "work" / "own")!r}, "w"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    lines = done.stdout.splitlines()
    assert lines[:7] == [f"refused {name}" for name in ("socket", "fork", "thread", "exec", "kill", "chmod", "setsid")]
    assert lines[7:-1] in ([], ["refused write", "refused truncate", "refused remove"])
    assert lines[-1] == "allowed work"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
def test_system_call_numbers_are_those_of_the_kernel_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers")
    defined = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    wrong = {
        name: numbers[0]
        for name, numbers in sandbox.SYSTEM_CALLS.items()
        if f"__NR_{name}" in defined and int(defined[f"__NR_{name}"]) != numbers[0]
    }
    assert wrong == {}


def test_code_runs_inside_a_reward_worker(tmp_path):
    specs = [RewardSpec(use="code_tests")]
    with RewardRunner(specs, base_dir=tmp_path, memory_limit_gib=2.0) as runner:
        scored = runner.score([(block(DOUBLE), Row({"tests": ["assert double(1) == 2"]}))])
    assert (scored[0].reward, scored[0].failure) == (1.0, None)
    assert scored[0].rewards == {"code_tests": 1.0, "code_tests/passed": 1.0}


def test_without_seccomp_it_refuses_rather_than_runs(monkeypatch, tmp_path):
    box = tmp_path / "weak_sandbox.py"
    box.write_text(Path(sandbox.__file__).read_text().replace("if refuse_system_calls(libc)", "if False"))
    monkeypatch.setattr("trainer.rewards.builtin.code_tests.SANDBOX", box)
    with pytest.raises(RuntimeError, match="allow_weak_sandbox"):
        passed(DOUBLE, "pass")
    assert passed(DOUBLE, "assert double(1) == 2", allow_weak_sandbox=True) == 1.0
    assert passed("import socket\nsocket.socket()", "pass", allow_weak_sandbox=True) == 0.0
