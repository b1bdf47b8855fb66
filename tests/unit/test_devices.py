"""Known GPUs and the shapes made of them by rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nvml import H100, H200, RTX_3090, RTX_4070, RTX_4090

from trainer.config.load import find_shape, known_devices
from trainer.errors import RecipeError, ShapeError


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("gpu", "known"),
    [
        (H100, ["h100"]),
        (H200, ["h200"]),
        (RTX_3090, ["rtx3090"]),
        (RTX_4090, ["rtx4090"]),
        (RTX_4070, []),
        (("NVIDIA A100-SXM4-40GB", 40960), ["a100_40g"]),
        (("NVIDIA A100-SXM4-80GB", 81920), ["a100"]),
        (("NVIDIA A100 80GB PCIe", 81920), ["a100"]),
        (("NVIDIA RTX A6000", 49140), ["a6000"]),
        (("NVIDIA L40S", 46068), ["l40s"]),
        (("NVIDIA L40", 46068), []),
        (("NVIDIA B200", 183359), ["b200"]),
        (("NVIDIA GeForce RTX 5090", 32607), ["rtx5090"]),
        (("NVIDIA GeForce RTX 4090 Laptop GPU", 16376), []),  # another GPU with less memory
        (("NVIDIA H100 NVL", 95830), []),  # 94 GB
        (("NVIDIA GH200 480GB", 97871), []),
    ],
)
def test_a_driver_names_a_known_gpu_by_words_and_memory(gpu, known):
    name, mib = gpu
    assert [short for short, device in known_devices().items() if device.is_named(name, mib / 1024)] == known


def test_a_shape_is_made_from_memory():
    one, sharded, whole = (find_shape(name) for name in ("rtx4090x1", "rtx4090x4", "rtx4090x4_dp"))
    # 23.5 GiB * 256 = 6,016 tokens, of which 4,096 is the next lower power of two
    assert [shape.micro_batch_tokens for shape in (one, sharded, whole)] == [4096] * 3
    assert [shape.sharding for shape in (one, sharded, whole)] == ["none", "full", "none"]
    assert [shape.num_ranks for shape in (one, sharded, whole)] == [1, 4, 4]
    # 23.5 GiB * 0.7 / 2 bytes, and on four devices four times that; a sequence may be four micro-batches long
    assert [shape.limits.lora.max_params_b for shape in (one, sharded, whole)] == [8.8, 35.3, 8.8]
    assert [shape.limits.lora.max_seq_tokens for shape in (one, sharded, whole)] == [16_384] * 3
    # 18 bytes per parameter
    assert one.limits.full is not None
    assert one.limits.full.max_params_b == 0.98


def test_a_shape_that_has_a_file_wins():
    assert find_shape("h100x8").limits.lora.max_params_b == 200
    assert find_shape("h100x4").limits.lora.max_params_b == 118.8


@pytest.mark.parametrize("name", ["rtx4090", "rtx4090x3", "rtx4090x0", "rtx4080x1", "x1", "rtx4090x1_dp"])
def test_other_numbers_and_devices_are_unknown(name):
    with pytest.raises(ShapeError, match=f"shape {name}: unknown"):
        find_shape(name)


def test_a_device_of_ones_own_makes_shapes():
    Path("configs/devices").mkdir(parents=True)
    fields = (
        "device_name: T-9, match: T9, memory_gib: 10, bf16_tflops: 1, bandwidth_gbps: 1, nvlink_gbps: 0, source: me"
    )
    Path("configs/devices/mine.yaml").write_text(f"t9: {{{fields}}}\n")
    assert find_shape("t9x2").gpu_memory_gib == 10
    Path("configs/devices/mine.yaml").write_text("t9:\n  device_name: T-9\n  memory_gib: -1\n")
    with pytest.raises(RecipeError, match=r"configs/devices/mine\.yaml:"):
        find_shape("t9x2")
