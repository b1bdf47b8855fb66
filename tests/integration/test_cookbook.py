"""Scripts of tinker-cookbook, unmodified, against a real server with a tiny model.

They read model and data by hub names, which here are directories beside them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from project import Project
from serving import Server, serving

ROOT = Path(__file__).parents[2]
TINKER = Path(os.environ.get("TUNESMITH_TINKER_PYTHON") or ROOT / ".venv-tinker" / "bin" / "python")
VERSION = "0.6.1"
MODEL = "Qwen/Qwen3-8B-Base"
"""A name that the cookbook knows, with a renderer of plain text; the directory has the tiny model."""


def found_version() -> str | None:
    """Of the cookbook; None where there is none."""
    if not TINKER.is_file():
        return None
    command = [str(TINKER), "-c", "import importlib.metadata as m; print(m.version('tinker-cookbook'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(found_version() is None, reason="no tinker-cookbook: set TUNESMITH_TINKER_PYTHON"),
]


@pytest.fixture(scope="module")
def place(shared: Project) -> Path:
    """Model and data under the names that the scripts use."""
    (shared.root / "Qwen").mkdir()
    (shared.root / MODEL).symlink_to(shared.root / "model")
    numbers = random.Random(0)
    sums = [(numbers.randint(1, 20), numbers.randint(1, 20)) for _ in range(64)]
    chats = [{"messages": [{"role": "user", "content": f"What is {a} + {b}?"},
                           {"role": "assistant", "content": f"{a} + {b} = {a + b}"}]} for a, b in sums]  # fmt: skip
    tasks = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in sums]
    for name, rows in (("HuggingFaceH4/no_robots", chats), ("openai/gsm8k", tasks)):
        directory = shared.root / name
        directory.mkdir(parents=True)
        (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    front = "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"
    (shared.root / "openai" / "gsm8k" / "README.md").write_text(front)
    (shared.root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return shared.root


@pytest.fixture(scope="module")
def server(shared: Project, place: Path) -> Iterator[Server]:
    options = ("--training", "--training-dir", "cook", "--training-dtype", "float32", "--kv-cache-tokens", "16384")
    with serving(shared, MODEL, "--served-name", MODEL, *options) as running:
        yield running
    del place


def start(place: Path, server: Server, module: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a script of the cookbook."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment: Mapping[str, str] = {
        **clean, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-none", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache"), "WANDB_MODE": "disabled",
    }  # fmt: skip
    words = [f"{name}={value}" for name, value in settings.items()]
    command = [str(TINKER), "-m", f"tinker_cookbook.recipes.{module}", *words]
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(place: Path, server: Server, module: str, **settings: Any) -> str:
    """Run a script to its end; returns what it said."""
    process = start(place, server, module, **settings)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-4000:]
    return said


def metrics(log: Path) -> list[dict[str, Any]]:
    file = log / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_the_cookbook_is_the_version_that_this_server_is_tested_with() -> None:
    assert found_version() == VERSION, f"a new cookbook: run its scripts by hand, then raise VERSION from {VERSION}"


def test_sl_loop_learns_and_resumes_where_it_was_killed(place: Path, server: Server) -> None:
    settings = {
        "model_name": MODEL, "batch_size": 4, "lora_rank": 8, "learning_rate": 1e-2, "save_every": 3, "max_steps": 9,
    }  # fmt: skip
    process = start(place, server, "sl_loop", log_path=place / "killed", **settings)
    deadline = time.monotonic() + 600
    while not (len(metrics(place / "killed")) >= 5 and (place / "killed" / "checkpoints.jsonl").is_file()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    said = run(place, server, "sl_loop", log_path=place / "killed", **settings)
    assert "Resuming from batch" in said
    again = [(each["step"], each["train_mean_nll"]) for each in metrics(place / "killed")]
    assert {step for step, _ in again} == set(range(9))
    assert len(again) > 9, "steps after the saved state are done once more"
    assert len(set(again)) == 9, "with the losses that they had: the client asks for no seed, so only within one run"
    assert again[-1][1] < again[0][1]


@pytest.mark.parametrize("loss", ["importance_sampling", "cispo", "gspo"])
def test_rl_loop_runs(place: Path, server: Server, loss: str) -> None:
    log = place / f"rl-{loss}"
    run(place, server, "rl_loop", model_name=MODEL, log_path=log, batch_size=4, group_size=4, lora_rank=4,
        learning_rate=1e-3, save_every=0, max_tokens=8, loss_fn=loss, max_steps=2)  # fmt: skip
    assert len(metrics(log)) == 2


def test_rl_loop_s_default_loss_is_refused_by_name(place: Path, server: Server) -> None:
    """stable_reinforce needs records of the sampler, which this server does not keep."""
    process = start(place, server, "rl_loop", model_name=MODEL, log_path=place / "rl-default", batch_size=4,
                    group_size=4, lora_rank=4, max_tokens=8, max_steps=1)  # fmt: skip
    said, _ = process.communicate(timeout=900)
    assert process.returncode != 0
    assert "record_stability_info is not supported by this server" in said


def test_chat_sl_trains_on_a_file_of_conversations(place: Path, server: Server) -> None:
    run(place, server, "chat_sl.train", model_name=MODEL, dataset=place / "chats.jsonl", log_path=place / "chat",
        batch_size=8, learning_rate=1e-2, lora_rank=4, max_length=128, eval_every=0, save_every=0, max_steps=4,
        renderer_name="role_colon", behavior_if_log_dir_exists="delete")  # fmt: skip
    assert len(metrics(place / "chat")) >= 4


def test_math_rl_trains_on_arithmetic(place: Path, server: Server) -> None:
    run(place, server, "math_rl.train", env="arithmetic", model_name=MODEL, log_path=place / "math", group_size=4,
        groups_per_batch=4, learning_rate=1e-3, lora_rank=4, max_tokens=5, eval_every=0, save_every=0, max_steps=2,
        renderer_name="role_colon", loss_fn="ppo", behavior_if_log_dir_exists="delete")  # fmt: skip
    assert len(metrics(place / "math")) >= 2  # and a line about its end
