"""`trainer doctor`: what it says of a machine, its remedies, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import fake_hub
from fake_nvml import H100, RTX_4090, fake_nvml

from trainer.commands.cli import main
from trainer.commands.doctor import (
    Finding,
    examine_devices,
    examine_directory,
    examine_hub,
    examine_libraries,
    examine_wandb,
    torch_cuda,
)
from trainer.planning.hub import HubState
from trainer.planning.machine import Device, Machine

GPU = Device(0, "GPU-0", H100[0], H100[1] / 1024)
TWO = Machine(devices=(GPU, Device(1, "GPU-1", H100[0], H100[1] / 1024)), driver="570.86.15", cuda="12.8")
TOPICS = ["GPUs", "host", "versions", "flock", "disk", "hub", "W&B"]


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def diagnosed(environment: dict[str, str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and findings by topic of a process with this environment."""
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "doctor", "--json"],
        env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, {finding["topic"]: finding for finding in json.loads(done.stdout)}


def installed(name: str) -> str | None:
    return "1.0"


def test_a_machine_without_gpu_can_train_and_exits_with_0():
    code, findings = diagnosed({"CUDA_VISIBLE_DEVICES": ""})
    assert code == 0
    assert set(TOPICS) <= findings.keys()
    assert findings["GPUs"]["text"].startswith(("none; recipes train on the CPU", "CUDA_VISIBLE_DEVICES hides"))
    assert "torch 2." in findings["versions"]["text"]


def test_the_text_is_a_line_for_each_finding(capsys):
    assert main(["doctor"]) in {0, 2}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][-3:] == TOPICS[-3:]
    assert all(line.split()[1] in {"ok", "note", "problem"} and line.endswith(".") for line in lines)


def test_gpus_that_torch_cannot_use_are_a_problem_and_exit_with_2(tmp_path):
    if torch_cuda() is not None:
        pytest.skip("torch is built for CUDA")
    code, findings = diagnosed(fake_nvml(tmp_path, RTX_4090, RTX_4090))
    assert code == 2
    assert findings["GPUs"]["text"] == (
        "2 x NVIDIA GeForce RTX 4090 (24.0 GiB, 165.2 TFLOP/s of bf16, 1008 GB/s); driver 570.86.15, "
        "CUDA up to 12.8; shapes rtx4090x1, rtx4090x2_dp, rtx4090x2"
    )
    assert findings["torch"]["state"] == "problem"
    assert "is built without CUDA and cannot use the GPUs" in findings["torch"]["text"]
    assert findings["torch"]["remedy"] == "Install a build for CUDA 12.8 or older"


def test_a_driver_that_does_not_answer_is_a_problem(tmp_path):
    code, findings = diagnosed(fake_nvml(tmp_path, H100, init=18))
    assert code == 2
    assert findings["GPUs"]["state"] == "problem"
    assert findings["GPUs"]["remedy"] == "Run `nvidia-smi`; after an update of the driver, reboot."


def test_memory_that_others_use_and_hidden_gpus_are_mentioned():
    busy = Device(3, "GPU-3", H100[0], 79.6, used_gib=20.0)
    notes = [each for each in examine_devices(Machine(devices=(busy,), hidden=7)) if each.state == "note"]
    assert [(note.topic, note.text) for note in notes] == [
        ("GPUs", "CUDA_VISIBLE_DEVICES hides 7 more"),
        ("GPU 3", "20.0 of 79.6 GiB are in use by other processes"),
    ]


@pytest.mark.parametrize(
    ("cuda", "state", "text"),
    [
        ("12.8", "ok", "built for CUDA 12.8"),
        ("12.9", "ok", "built for CUDA 12.9"),  # minor versions are compatible
        ("13.0", "problem", "torch is built for CUDA 13.0, and the driver supports CUDA up to 12.8"),
        (None, "problem", "torch 1.0 is built without CUDA and cannot use the GPUs"),
    ],
)
def test_torch_must_match_the_driver(cuda, state, text):
    (finding,) = (each for each in examine_libraries(TWO, cuda, installed) if each.topic == "torch")
    assert (finding.state, finding.text) == (state, text)


def test_collectives_of_several_gpus_need_nccl():
    def without_nccl(name: str) -> str | None:
        return None if name.startswith("nvidia-nccl") else "1.0"

    assert Finding("NCCL", "ok", "1.0") in list(examine_libraries(TWO, "12.8", installed))
    (note,) = (each for each in examine_libraries(TWO, "12.8", without_nccl) if "nvidia-nccl" in each.text)
    assert note.state == "note"
    one = Machine(devices=(GPU,), cuda="12.8")
    assert "NCCL" not in {each.topic for each in examine_libraries(one, "12.8", without_nccl)}


def test_kernels_for_gpus_need_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (finding,) = (each for each in examine_libraries(TWO, "12.8", installed) if each.topic == "compiler")
    assert (finding.state, finding.remedy) == ("problem", "Install gcc")
    assert "compiler" not in {each.topic for each in examine_libraries(Machine(), None, installed)}


def test_missing_libraries_and_extras_are_named_with_their_install_command():
    def version_of(name: str) -> str | None:
        return None if name in {"trl", "bitsandbytes"} else "1.0"

    findings = list(examine_libraries(Machine(), None, version_of))
    assert Finding("versions", "problem", "not installed: trl", "Run `pip install tunesmith`") in findings
    extras = "not installed: bitsandbytes (pip install 'tunesmith[qlora]')"
    assert Finding("extras", "note", extras) in findings


def test_the_directory_of_runs_is_tried(tmp_path):
    lock, disk = examine_directory(tmp_path / "none" / "runs")
    assert lock == Finding("flock", "ok", "works")
    assert disk.text.startswith(f"{tmp_path}: ")


def test_a_file_system_without_locks_is_mentioned(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "flock.c").write_text(
        "#include <errno.h>\nint flock(int handle, int kind) { errno = ENOLCK; return -1; }\n"
    )
    library = tmp_path / "flock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "flock.c"], check=True, timeout=60)
    _, findings = diagnosed({"LD_PRELOAD": str(library)})
    assert findings["flock"]["state"] == "note"
    assert findings["flock"]["text"] == f"{tmp_path}: file locks (flock) do not work here (ENOLCK)"


def test_a_directory_that_cannot_be_written_is_a_problem():
    (finding,) = examine_directory(Path("/proc/runs"))  # not even by root
    assert finding.state == "problem"
    assert finding.text.startswith("/proc: cannot be written (")


def test_a_hub_that_does_not_answer_is_no_problem():
    finding = examine_hub(HubState("https://hub", False, Path("cache"), 2, "https://hub cannot be reached"))
    assert (finding.state, finding.text) == ("note", "https://hub cannot be reached; 2 models in cache")


def test_the_hub_is_asked(tmp_path):
    with fake_hub(b"{}") as hub:
        _, answering = diagnosed(hub.environment(str(tmp_path / "hf")))
    _, silent = diagnosed(hub.environment(str(tmp_path / "hf")))
    assert answering["hub"]["text"].startswith(f"{hub.url} answers; not logged in")
    assert silent["hub"]["text"].startswith(f"{hub.url} cannot be reached (ConnectError)")


def test_a_wandb_login_is_found_where_wandb_looks_for_it(tmp_path, monkeypatch):
    assert examine_wandb().text == "no key"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    assert examine_wandb().text == f"key for api.wandb.ai in {tmp_path}/.netrc"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert examine_wandb().text == "key in WANDB_API_KEY"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert examine_wandb().text == "WANDB_MODE=offline"
