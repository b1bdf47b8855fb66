"""The GPUs of this machine: what the driver says, and what CUDA_VISIBLE_DEVICES leaves of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from fake_nvml import H100, RTX_3090, RTX_4090, fake_nvml

from trainer.planning import machine
from trainer.planning.machine import Device, Machine, host_memory_gib, this_machine, visible_devices

ASK = "import json, dataclasses; from trainer.planning.machine import this_machine as ask; "
ASK += "print(json.dumps(dataclasses.asdict(ask())))"


def asked(environment: dict[str, str]) -> dict[str, Any]:
    """What a process with this environment finds."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=inherited | environment, capture_output=True, text=True, timeout=60, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_every_gpu_is_found_with_name_memory_and_driver(tmp_path):
    found = asked(fake_nvml(tmp_path, H100, H100))
    assert [device["index"] for device in found["devices"]] == [0, 1]
    assert found["devices"][1]["name"] == "NVIDIA H100 80GB HBM3"
    assert found["devices"][1]["memory_gib"] == 81559 / 1024
    assert found["devices"][1]["used_gib"] == 0.5
    assert (found["driver"], found["cuda"], found["problem"]) == ("570.86.15", "12.8", None)


def test_hidden_gpus_are_left_out_and_counted(tmp_path):
    found = asked(fake_nvml(tmp_path, H100, H100, H100) | {"CUDA_VISIBLE_DEVICES": "2"})
    assert [device["index"] for device in found["devices"]] == [2]
    assert found["hidden"] == 2


def test_a_partitioned_gpu_is_its_first_instance(tmp_path):
    environment = fake_nvml(tmp_path, H100, instances=3)
    (device,) = asked(environment)["devices"]
    assert (device["uuid"], device["is_mig"], device["memory_gib"]) == ("MIG-1-of-0", True, 81559 / 4096)
    (named,) = asked(environment | {"CUDA_VISIBLE_DEVICES": "MIG-3"})["devices"]
    assert named["uuid"] == "MIG-3-of-0"


def test_a_gpu_that_shares_the_memory_of_the_host_has_all_of_it(tmp_path):
    (device,) = asked(fake_nvml(tmp_path, ("NVIDIA GB10", 0)))["devices"]
    assert device["memory_gib"] == host_memory_gib()


def test_a_driver_that_does_not_answer_is_a_problem_and_not_a_machine_without_gpu(tmp_path):
    found = asked(fake_nvml(tmp_path, H100, init=18))
    assert found["devices"] == []
    assert "NVML/RM version mismatch" in found["problem"]


def test_a_gpu_without_nvml_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "KERNEL_DRIVER", tmp_path)
    if not this_machine().devices:
        assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in str(this_machine().problem)
    monkeypatch.setattr(machine, "KERNEL_DRIVER", tmp_path / "none")
    if not this_machine().devices:
        assert this_machine() == Machine()


EQUAL = [Device(index, f"GPU-{index}a{index}", "NVIDIA H100 80GB HBM3", 79.6) for index in range(4)]
MIXED = [Device(0, "GPU-aa", RTX_3090[0], 24.0), Device(1, "GPU-ab", RTX_4090[0], 23.99), Device(2, "GPU-c", "T", 15.0)]


@pytest.mark.parametrize(
    ("given", "indices"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        ("0, 1", [0, 1]),
        ("0,1,9,2", [0, 1]),  # the list ends before the first invalid index
        ("1,-1,2", [1]),
        ("1,1", []),  # the same device twice: CUDA sees none
        ("GPU-2a2", [2]),
        ("GPU-3,GPU-0", [3, 0]),  # the beginning of a UUID is enough
        ("GPU-", []),  # but it must be of one device
        ("GPU-9", []),
        ("1,GPU-2", [1, 2]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(given, indices):
    visible = visible_devices(EQUAL, {"CUDA_VISIBLE_DEVICES": given})
    assert [device.index for device in visible] == indices


def test_without_the_variable_every_gpu_is_visible():
    assert visible_devices(EQUAL, {}) == tuple(EQUAL)


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, [RTX_3090[0], RTX_4090[0], "T"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["T"]),  # CUDA's first is the fastest, which NVML does not say
        ({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [RTX_3090[0]]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-ab"}, [RTX_4090[0]]),
    ],
)
def test_an_index_among_different_gpus_means_the_one_with_least_memory(environment, names):
    assert [device.name for device in visible_devices(MIXED, environment)] == names
