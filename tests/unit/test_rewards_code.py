"""code_tests: what passes is rewarded, and model-written code reaches nothing outside its directory."""

import http.server
import json
import os
import platform
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import trainer
from trainer.config.rft_sections import RewardSpec
from trainer.rewards.builtin.code_tests import check_row, code_tests
from trainer.rewards.runner import RewardRunner
from trainer.rewards.sandbox import system_calls
from trainer.rewards.sandbox.system_calls import MACHINES
from trainer.types import Row

pytestmark = pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in MACHINES, reason="needs seccomp")


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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
def test_system_call_numbers_are_those_of_the_kernel_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers")
    defined = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    wrong = {
        name: numbers[0]
        for name, numbers in {**system_calls.ALLOWED, **system_calls.CONDITIONAL, **system_calls.NOT_THERE}.items()
        if f"__NR_{name}" in defined and numbers[0] is not None and int(defined[f"__NR_{name}"]) != numbers[0]
    }
    assert wrong == {}


def test_code_runs_inside_a_reward_worker(tmp_path):
    specs = [RewardSpec(use="code_tests")]
    with RewardRunner(specs, base_dir=tmp_path, memory_limit_gib=2.0) as runner:
        scored = runner.score([(block(DOUBLE), Row({"tests": ["assert double(1) == 2"]}))])
    assert (scored[0].reward, scored[0].failure) == (1.0, None)
    assert scored[0].rewards == {"code_tests": 1.0, "code_tests/passed": 1.0}


def test_without_seccomp_it_refuses_rather_than_runs(monkeypatch, tmp_path):
    weak = tmp_path / "weak_run.py"
    weak.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(trainer.__file__).parents[1])!r})\n"
        "from trainer.rewards.sandbox import fences, run\n"
        "fences.filter_system_calls = lambda libc: False\nrun.main()\n"
    )
    monkeypatch.setattr("trainer.rewards.sandbox.client.RUN", weak)
    with pytest.raises(RuntimeError, match="allow_weak_sandbox"):
        passed(DOUBLE, "pass")
    assert passed(DOUBLE, "assert double(1) == 2", allow_weak_sandbox=True) == 1.0
    assert passed("import socket\nsocket.socket()", "pass", allow_weak_sandbox=True) == 0.0


# Each line tries one thing that harms, forges or stays behind, and raises where it was refused.
ATTACKS = {
    "signal by fcntl": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, {ppid})",  # F_SETOWN
    "O_ASYNC": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)",
    "F_SETSIG": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)",
    "times outside": "import os\nos.utime('{victim}', (1, 1))",
    "times inside": "import os\nopen('x', 'w').close()\nos.utime('x', (1, 1))",
    "System V segment": "import ctypes\nif ctypes.CDLL(None).shmget(0x1234, 4096, 0o1666) < 0: raise OSError",
    "message queue": "import ctypes\nif ctypes.CDLL(None).msgget(0x1234, 0o1666) < 0: raise OSError",
    "semaphores": "import ctypes\nif ctypes.CDLL(None).semget(0x1234, 1, 0o1666) < 0: raise OSError",
    "POSIX queue": "import ctypes\nif ctypes.CDLL(None).syscall(240, b'q', 0o102, 0o666, None) < 0: raise OSError",
    "environment of the parent": "open('/proc/{ppid}/environ').read()",
    "environment of init": "open('/proc/1/environ').read()",
    "a file of the user": "open('{victim}').read()",
    "passwords": "open('/etc/passwd').read()",
    "memory file": "import os\nos.memfd_create('big')",
    "host name": "import socket\nsocket.sethostname('mine')",
    "swapoff": "import ctypes\nif ctypes.CDLL(None).swapoff(b'/x') < 0: raise OSError",
    "kexec": "import ctypes\nif ctypes.CDLL(None).syscall(320, 0, 0, 0, 0, 0) < 0: raise OSError",
    "domain name": "import ctypes\nif ctypes.CDLL(None).setdomainname(b'x', 1) < 0: raise OSError",
    "new mount calls": "import ctypes\nif ctypes.CDLL(None).syscall(430, b'tmpfs', 0) < 0: raise OSError",
    "new namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) < 0: raise OSError",
    "datagram to a name": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "a.sendto(b'x', '/dev/log')",
    "socket": "import socket\nsocket.socket()",
    "fork": "import os\nos.fork()",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "signal to the parent": "import os\nos.kill(os.getppid(), 0)",
    "a terminal's input": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",  # TIOCSTI
    "priority": "import os\nos.nice(-5)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))",
}


END = "\nexcept (OSError, ValueError):\n    refused = True\nelse:\n    refused = False"


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_the_kernel(name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    before = victim.stat()
    code = ATTACKS[name].replace("{victim}", str(victim)).replace("{ppid}", str(os.getpid()))
    wrapped = "try:\n" + textwrap.indent(code, "    ") + END
    assert passed(wrapped, "assert refused") == 1.0
    assert (victim.read_text(), victim.stat().st_mtime_ns) == ("kept", before.st_mtime_ns)


def test_emptying_what_python_itself_refuses_opens_nothing(tmp_path):
    """Nothing rests on an audit hook: code that could take one away still meets the kernel."""
    code = (
        "import gc, sys, types\n"
        "for each in gc.get_objects():\n"
        "    if isinstance(each, list) and any(isinstance(x, types.FunctionType) for x in each): each.clear()\n"
        "main = sys.modules['__main__'].__dict__\n"
        "try:\n    open('/etc/passwd')\nexcept OSError:\n    refused = True"
    )
    assert passed(code, "assert refused") == 1.0


def test_disk_is_bounded_in_all(tmp_path):
    many = "for n in range(20_000): open(str(n), 'w').close()\nimport time\ntime.sleep(5)"
    large = "for n in range(30): open(str(n), 'wb').write(bytes(15 << 20))\nimport time\ntime.sleep(5)"
    assert passed(many, "pass") == 0.0
    assert passed(large, "pass") == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "import threading\nfound = []\nt = threading.Thread(target=found.append, args=(4,))\n"
        "t.start(); t.join()\nx, = found",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.001)\n    return 4\nx = asyncio.run(f())",
        "import numpy as np\nx = int((np.ones((2, 2)) @ np.ones((2, 2))).sum() / 2)",
        "import pickle\nclass P:\n    def __init__(self): self.x = 4\nx = pickle.loads(pickle.dumps(P())).x",
        "import typing\nclass Q: pass\nclass P:\n    q: 'Q'\nx = 4 * (typing.get_type_hints(P)['q'] is Q)",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as p: x = sum(p.map(int, '22'))",
        "import sys\nsys.stderr.write('debug')\nx = 4",
        "x = 4 if '\\d' else 0",  # a SyntaxWarning on some versions
        "import warnings\nwarnings.warn('old')\nx = 4",
        "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('4'); f.seek(0); x = int(f.read())",
        "import datetime, zoneinfo, random, heapq, bisect, functools, decimal, fractions\nx = 4",
    ],
)
def test_honest_code_runs(code):
    assert passed(code, "assert x == 4") == 1.0
    assert passed(code + "\nprint(x)", {"input": "", "output": "4"}) == 1.0


def test_an_object_that_equals_everything_passes_nothing():
    yes = "class Yes:\n    def __eq__(self, other): return True\n    def __hash__(self): return 4\n"
    assert passed(yes + "def double(x): return Yes()", "assert double(2) == 4") == 0.0
    assert passed(yes + "def double(x): return Yes()", "assert 4 == double(2)") == 0.0
    assert passed(yes + "def double(x): return [Yes()]", "assert double(2) == [4]") == 0.0
    assert passed(yes + "def double(x): return {'a': Yes()}", "assert double(2) == {'a': 4}") == 0.0
    point = "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    assert passed(point + "def f(): return [P(1)]", "assert f() == [P(1)]", "assert f() != [P(2)]") == 1.0


SUM = "a, b = map(int, input().split())\nprint(a + b)"
PAIRS = [{"input": "1 2", "output": "3"}, {"input": "5 5", "output": "10"}]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (f"```Python\n{SUM}\n```", 1.0),
        (f"```\n{SUM}\n```", 1.0),
        (f"```python\r\n{SUM}\r\n```\r\n".replace("\n", "\r\n").replace("\r\r", "\r"), 1.0),
        (f"1. Do this:\n\n   ```py\n{textwrap.indent(SUM, '   ')}\n   ```", 1.0),
        (f"```python\nprint(0)\n```\nBetter:\n```python\n{SUM}\n```", 1.0),
        (f"```python\n{SUM}\n```\nIt prints\n```\n3\n```", 1.0),  # a block without a label beside one with
        (f"<think>\n```python\nprint(0)\n```\n</think>\n```python\n{SUM}\n```", 1.0),
        (f"<think>\n```python\n{SUM}\n```", 0.0),  # never stopped thinking
        (f"~~~python\n{SUM}\n~~~", 1.0),
        (f"```python\n{SUM}", 1.0),
        (f"```bash\n{SUM}\n```", 0.0),
    ],
)
def test_code_is_found_as_people_write_it(completion, value):
    assert code_tests(completion, {"tests": PAIRS}).value == value


def test_which_block_is_a_choice():
    text = f"```python\n{SUM}\n```\nANSWER\n```python\nprint(3)\n```\n```python\nprint(4)\n```"
    one = {"tests": [{"input": "1 2", "output": "3"}]}
    assert [code_tests(text, one, block=block).value for block in ("first", "last", "after ANSWER")] == [1.0, 0.0, 1.0]
    assert code_tests(text, one, block="after NOTHING").value == 0.0
    with pytest.raises(ValueError, match="block must be"):
        code_tests(text, one, block="middle")


@pytest.mark.parametrize(
    "tests",
    [
        {"input": ["1 2", "5 5"], "output": ["3", "10"]},
        {"inputs": ["1 2", "5 5"], "outputs": ["3\n", "10\n"]},
        json.dumps({"inputs": ["1 2", "5 5"], "outputs": ["3", "10"]}),
        json.dumps(PAIRS),
        [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}],
    ],
)
def test_tests_have_the_forms_that_datasets_have(tests):
    assert code_tests(block(SUM), {"tests": tests}).value == 1.0


def test_functions_are_called_with_the_arguments_of_a_row():
    plain, method = "def add(a, b): return a + b", "class Solution:\n    def add(self, a, b): return a + b"
    for code in (plain, method):
        assert code_tests(block(code), {"tests": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}}).value == 1.0
        assert code_tests(block(code), {"tests": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}}).value == 1.0
        assert code_tests(block(code), {"tests": {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}}).value == 1.0
        assert code_tests(block(code), {"tests": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [4]}}).value == 0.0


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ([], "must be a list of tests"),
        ("not JSON", "is text, but not JSON"),
        ([{"input": 4, "output": 8}], "must be texts or lists of lines"),
        ({"input": ["1"], "output": ["1", "2"]}, "1 inputs, but 2 outputs"),
        ([{"stdin": "1"}], "has `input` and `output`"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "needs the function's name"),
    ],
)
def test_tests_of_another_form_are_refused_with_their_row(tests, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        check_row(Row({"tests": tests}, "rows.jsonl", 7))
    assert "rows.jsonl:7: tests" in str(caught.value)


def test_an_endless_loop_costs_one_budget_and_fails_no_reward(tmp_path):
    row = Row({"tests": [{"input": "1 2", "output": "3"}] * 12})
    for args in ({}, {"partial": True}):
        with RewardRunner([RewardSpec(use="code_tests", args=args)], base_dir=tmp_path, timeout_s=2.0) as runner:
            scored = runner.score([(block("while True: pass"), row)])
        assert (scored[0].reward, scored[0].failure) == (0.0, None)


@pytest.fixture(scope="module")
def sandbox_server():
    """The server of the documentation, on a free port."""
    script = Path(__file__).parents[2] / "docs" / "examples" / "sandbox_server.py"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


@pytest.mark.parametrize(
    ("code", "value"),
    [("def double(x): return 2 * x", 1.0), ("def double(x): return x", 0.0), ("import os; os.fork()", 0.0)],
)
def test_a_sandbox_elsewhere_has_the_same_contract(sandbox_server, code, value):
    assert passed(code, "assert double(2) == 4", sandbox_url=sandbox_server) == value
    program = {"tests": [{"input": "4\n", "output": "8"}]}
    answer = "```python\nprint(2 * int(input()))\n```"
    assert code_tests(answer, program, sandbox_url=sandbox_server).value == 1.0


def test_a_sandbox_that_is_not_there_or_answers_nonsense_is_a_failure_and_no_zero():
    with pytest.raises(RuntimeError, match="ConnectError"):
        passed(DOUBLE, "assert double(2) == 4", sandbox_url="http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(RuntimeError, match="HTTP 501"):
            passed(DOUBLE, "assert double(2) == 4", sandbox_url=url)
        thread.join()
