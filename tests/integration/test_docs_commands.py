"""Every command in the README and in docs/ is typed in a project with a tiny model, or listed with a reason."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from doc_commands import ROOT, Command, commands, pages
from forked import ForkedPython
from project import PATIENCE_S
from tiny import tiny_model_dir

from conftest import write_files

MODEL: Final = "models/SmolLM2-135M-Instruct"
CUT: Final[dict[str, Any]] = {
    "rows_per_step": 4,
    "steps": 3,
    "epochs": None,
    "optimizer": {"learning_rate": 1e-2},
    "eval_interval": 0,
    "dcp_save_interval": 1,
}
RFT_CUT: Final[dict[str, Any]] = {**CUT, "rows_per_step": 2, "steps": 10}
TASK: Final = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: task_rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""

NOT_RUN: Final = {
    "pip install": "installs packages into the environment of the tests; test_wheel.py installs the wheel",
    "docker": "needs a container runtime and a registry",
    "sky jobs launch": "rents a machine",
    "kubectl create": "needs a cluster",
    "scripts/quickstart": "makes an environment and trains for minutes; its commands are run one by one",
    "scripts/test": "runs these tests",
    "trainer submit recipe.yaml --launcher slurm --partition": "needs a cluster; test_slurm.py has one",
    "trainer eval my_run --tasks arc_easy": "takes rows from a hub",
    "trainer export my_run --push": "needs a hub and a token; test_hub.py has a hub",
    "trainer export my_run --merge --gguf q8_0 --converter": "needs a checkout of llama.cpp",
    "python -m venv .venv-vllm": "a vLLM server needs an environment of gigabytes; test_vllm.py starts one",
    ".venv-vllm/bin/pip": "as above",
    "CUDA_VISIBLE_DEVICES=7": "needs a GPU",
    "trainer serve my_run --engine vllm": "needs vLLM; test_vllm_managed.py has one",
    "trainer train recipe.yaml --set rollout.sampler=vllm": "as above",
    "python -m venv .venv-verifiers": "an environment of its own; test_verifiers.py has one",
    "trainer train examples/verifiers_taskset/train.yaml": "as above",
    "PYTHONPATH=DIRECTORY_OF_THE_PACKAGE_TRAINER": "as above",
    "trainer train recipes/sft_calculator.yaml": "trains for minutes; test_recipes.py cuts every recipe",
    "trainer train recipes/rft_calculator.yaml": "as above",
    "trainer train recipes/sft_guess.yaml": "as above",
    "trainer train recipes/rft_guess.yaml": "as above",
    "trainer train recipes/rft_sql_agent_qwen3_8b_h100x8_vllm2.yaml": "needs eight GPUs; test_recipes.py cuts it",
}
"""Beginnings of commands that are not run, and why."""
KILLS: Final = "trainer verify-resume"
"""Kills process trees, so real ones, which takes 40 s: `heavy`; test_verify_resume.py does the same in CI."""
NEEDS: Final = {
    "--tasks my_task.yaml": "lm_eval",
    "--to tensorboard": "tensorboard",
    "trainer serve": "llguidance",
    "trainer batch": "llguidance",
    "http://127.0.0.1:8000": "llguidance",
}
"""Modules of extras, by a part of the commands that need them."""
SERVERS: Final = {
    "trainer serve": "/ready",
    "trainer report my_run --serve": "/",
    "python docs/examples/reward_server.py": None,
}
"""Commands that run until Ctrl-C, with a path that answers 200 once they are ready."""
PROMISED: Final = {
    "trainer train recipes/sft_quickstart.yaml": r"runs/sft_quickstart/adapter\n",
    "trainer check recipes/sft_quickstart.yaml": r"ready: 3 steps",
    "trainer check recipes/sft_quickstart.yaml --data --row 17": r"extract_train.jsonl:17\b",
    "trainer check recipes/sft_quickstart.yaml --data --find Budapest": r"Budapest",
    "trainer check chats.yaml --data": r"preview\.html",
    "trainer check recipes/rft_quickstart.yaml --rewards": r"gold",
    "trainer chat sft_quickstart --against base": r"base",
    "trainer status sft_quickstart": r"finished",
    "trainer runs": r"sft_quickstart +finished",
    "trainer report sft_quickstart": r"report\.html",
    "trainer rollouts rft_quickstart --step 10": r"step 10",
    "trainer export sft_quickstart --merge": r"runs/sft_quickstart/merged",
    "trainer export sft_quickstart --merge --gguf q8_0 --ollama": r"runs/sft_quickstart/gguf",
    "trainer submit recipe.yaml": r"runs/my_run\n",
    "trainer jobs": r"my_run",
    "trainer docs data": r"# Rows",
    "trainer submit recipe.yaml --launcher slurm --print": r"#SBATCH",
    "trainer check recipe.yaml --shape h200x1": r"accelerate(.|\n)*torchrun(.|\n)*slurm",
    "python docs/examples/driver.py recipe.yaml my_run": r"finished",
}
"""What the page says that is printed, as a regular expression."""
STANDARD_INPUT: Final = {"trainer chat": "hello\nwhat is 1 + 1?\n"}


def reason(command: Command) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for begin, why in NOT_RUN.items() if command.text.startswith(begin)), None)


@dataclass
class Reader:
    """A user who types the commands of the pages, one after another, in one project."""

    root: Path
    python: ForkedPython
    server: subprocess.Popen[bytes] | None = None
    port: int = 0

    def environment(self, *, is_forked: bool = True) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRAINER_", "PYTEST_"))}
        first = str(self.python.bin) if is_forked else str(Path(sys.executable).parent)
        return clean | {
            "PATH": f"{first}:{os.environ['PATH']}",
            "HOME": str(self.root / "home"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        }

    def types(self, text: str, *, is_forked: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in bash, as it is written, to its end."""
        typed = next((typed for begin, typed in STANDARD_INPUT.items() if text.startswith(begin)), "")
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")],
            cwd=self.root,
            env=self.environment(is_forked=is_forked),
            input=typed,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def start_server(self, text: str, path: str | None) -> None:
        """Start what runs until Ctrl-C, and wait until it answers; a server of before ends first."""
        self.end_server()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        asked = re.sub(r"--port \d+", "", text) + f" --port {self.port}"
        with (self.root / "server.log").open("wb") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {asked}"],
                cwd=self.root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + PATIENCE_S
        while not self._answers(path):
            assert self.server.poll() is None, (self.root / "server.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)

    def _answers(self, path: str | None) -> bool:
        import httpx

        try:
            answer = httpx.get(f"http://127.0.0.1:{self.port}{path or '/'}")
        except httpx.TransportError:
            return False
        return path is None or answer.status_code == 200

    def end_server(self) -> None:
        """Press Ctrl-C, and require that it ends."""
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            code = self.server.wait(PATIENCE_S)
            self.server = None
            assert code in {0, 130}, (self.root / "server.log").read_text()

    def answers_questions(self, text: str, *answers: str) -> str:
        """Run a command at a terminal and answer what it asks; returns what the terminal showed."""
        shown = b""
        pid, handle = pty.fork()
        if pid == 0:
            os.chdir(self.root)
            os.execvpe("bash", ["bash", "-c", text], self.environment())
        os.write(handle, "".join(answer + "\n" for answer in answers).encode())
        while True:
            try:
                part = os.read(handle, 4096)
            except OSError:  # the other end was closed
                break
            shown += part
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown.decode()
        return shown.decode()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    root = tmp_path_factory.mktemp("reader").resolve()
    (root / "home/.local/share/bash-completion/completions").mkdir(parents=True)
    write_project(root)
    with ForkedPython(tmp_path_factory.mktemp("python")) as python:
        reader = Reader(root, python)
        yield reader
        if reader.server is not None:
            reader.server.kill()
            reader.server.wait()


def write_project(root: Path) -> None:
    """What the pages take for granted: a model, rows and a recipe of one's own, files of other tools and of ours."""
    write_files(root)
    for name in ("recipes", "datasets", "docs/examples", "examples"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    tiny_model_dir(root / MODEL)
    tiny_model_dir(root / "models/other", seed=5)
    for file in [*root.glob("recipes/*.yaml"), *root.glob("examples/*/recipe.yaml")]:
        cut(file)
    shutil.copy(root / "train.jsonl", root / "chats.jsonl")
    questions = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(24)]
    write_rows(root / "problems.jsonl", questions)
    write_rows(root / "prompts.jsonl", [{"prompt": row["prompt"]} for row in questions[:3]])
    (root / "prompts.txt").write_text("What is 1 + 1?\nWho are you?\n")
    choices = [{"question": f"{n} + 1 =", "choices": [" 1", f" {n + 1}"], "gold": 1} for n in range(1, 5)]
    write_rows(root / "task_rows.jsonl", choices)
    (root / "my_task.yaml").write_text(TASK)
    (root / "rewards.py").write_text("def my_reward(completion, row):\n    return float('1' in completion)\n")
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    write_rows(root / "requests.jsonl", [request])
    recipe = {
        "name": "my_run",
        "method": "sft",
        "model": {"path": MODEL},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "eval_rows": 4, "max_seq_tokens": 256},
        **{name: value for name, value in CUT.items() if value is not None},
        "steps": 4,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    axolotl = {"base_model": MODEL, "adapter": "lora", "lora_r": 4, "sequence_len": 256, "num_epochs": 1}
    axolotl |= {"datasets": [{"path": "chats.jsonl", "type": "chat_template"}], "output_dir": "./out"}
    (root / "axolotl.yml").write_text(yaml.safe_dump(axolotl))
    trl = {"model_name_or_path": MODEL, "dataset_name": "chats.jsonl", "use_peft": True, "max_length": 256}
    (root / "trl.yaml").write_text(yaml.safe_dump({**trl, "num_train_epochs": 1, "output_dir": "out"}))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut(file: Path) -> None:
    """Make a recipe short: few steps of few rows; the tiny tokenizer makes more tokens."""
    recipe = yaml.safe_load(file.read_text())
    recipe |= RFT_CUT if recipe["method"] == "rft" else CUT
    recipe["data"] |= {"max_seq_tokens": 512} | ({"eval_rows": 4} if "eval" in recipe["data"] else {})
    if "rollout" in recipe:
        recipe["rollout"] |= {"group_size": 2, "max_completion_tokens": 8}
    file.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))


def _copy(name: str) -> Callable[[Reader], None]:
    def copy(reader: Reader) -> None:
        shutil.copytree(reader.root / "runs/sft_quickstart", reader.root / "runs" / name, dirs_exist_ok=True)

    return copy


def _long_run(reader: Reader) -> None:
    """A run that is not finished yet, for commands about such a run."""
    shutil.rmtree(reader.root / "runs/my_run")
    assert reader.types("trainer submit recipe.yaml --set steps=100000 && sleep 1").returncode == 0


def _short_again(reader: Reader) -> None:
    for command in (
        "trainer cancel my_run",
        "trainer status my_run --follow; rm -r runs/my_run",
        "trainer train recipe.yaml",
    ):
        done = reader.types(command)
        assert done.returncode == 0, done.stderr


def _with_mirror(reader: Reader) -> None:
    """What the page says that a run on another machine needs."""
    recipe = yaml.safe_load((reader.root / "recipe.yaml").read_text())
    (reader.root / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"checkpoint": {"mirror": "s3://bucket/runs"}}))


def _without_mirror(reader: Reader) -> None:
    recipe = yaml.safe_load((reader.root / "recipe.yaml").read_text())
    del recipe["checkpoint"]
    (reader.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))


SKY: Final = (
    "trainer submit recipe.yaml --launcher sky --sky setup='pip install git+https://...@COMMIT' --print > task.yaml"
)
BEFORE: Final[dict[str, Callable[[Reader], None]]] = {
    "trainer diff sft_quickstart other_run": _copy("other_run"),
    "trainer eval my_sft_run --reward rewards.py:my_reward": _copy("my_sft_run"),
    "trainer cancel runs/my_run": _long_run,
    SKY: _with_mirror,
    "curl -sS http://127.0.0.1:8000/v1/chat/completions": lambda reader: reader.start_server(
        "trainer serve sft_quickstart", "/ready"
    ),  # of the two servers that the page starts before, the last one runs
    "trainer import-config trl.yaml --gpus 8 --out my.yaml": lambda reader: (reader.root / "my.yaml").unlink(),
}
AFTER: Final[dict[str, Callable[[Reader], None]]] = {
    "trainer init --data chats.jsonl --yes": lambda reader: cut(reader.root / "chats.yaml"),
    "trainer reconnect runs/my_run": _short_again,
    SKY: _without_mirror,
}


def test_the_list_of_what_is_not_run_is_not_longer_than_needed() -> None:
    texts = [command.text for command in commands()]
    for begin in [KILLS, *NOT_RUN, *NEEDS, *SERVERS, *PROMISED, *STANDARD_INPUT, *BEFORE, *AFTER]:
        assert [text for text in texts if begin in text], f"no page has `{begin}` any more"
    assert len(texts) > 90


def test_every_line_of_a_shell_block_is_a_command() -> None:
    """None is overlooked: what stands in a block of bash is found by its program."""
    found = {command.text for command in commands()}
    for page in pages():
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                assert line.startswith("#") or re.split(r"\s{2,}|\s+#\s", line)[0] in found, f"{page.name}: {line}"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(each, marks=[pytest.mark.heavy] if each.text.startswith(KILLS) else [], id=str(each))
        for each in commands()
        if reason(each) is None
    ],
)
def test_the_command_works(command: Command, reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    text = command.text
    for part, module in NEEDS.items():
        if part in text and find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    _do(BEFORE, text, reader)
    server = next((path for begin, path in SERVERS.items() if text.startswith(begin)), "no server")
    if server != "no server":
        reader.start_server(text, server)
        return
    if text == "trainer init":
        shown = reader.answers_questions(text, "sft", MODEL, "chats.jsonl", "all", "cpu")
        assert re.findall(r"(\d)/5", shown) == list("12345")
        (reader.root / "chats.yaml").unlink()
        return
    if "127.0.0.1:8000" not in text:
        reader.end_server()
    done = reader.types(text, is_forked=not text.startswith(KILLS))
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if text in PROMISED:
        assert re.search(PROMISED[text], done.stdout + done.stderr), f"{command}\n{done.stdout}\n{done.stderr}"
    if text.startswith("curl"):  # which succeeds with every answer
        assert done.stdout.strip()
        assert "error" not in done.stdout
    _do(AFTER, text, reader)


def _do(table: dict[str, Callable[[Reader], None]], text: str, reader: Reader) -> None:
    for begin, act in table.items():
        if text.startswith(begin):
            act(reader)
