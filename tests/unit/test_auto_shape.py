"""`shape: auto` on machines of every kind: the GPUs that are there, and what is said of the choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import H100, RTX_3090, RTX_4070, RTX_4090, fake_nvml
from small_recipe import RFT, SFT, write_small

from trainer.config.devices import made_shapes
from trainer.config.load import all_shapes, known_devices, load_recipe
from trainer.errors import ShapeError
from trainer.planning import choose_shape
from trainer.planning.machine import Device, Machine
from trainer.planning.machine_shapes import machine_shapes
from trainer.planning.plan import Plan, make_plan

EIGHT_B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False, "model_type": "qwen3",
}  # fmt: skip
"""Qwen3-8B."""
LONG = ["data.max_seq_tokens=2048", "rows_per_step=64"]
MachineOf = Callable[..., None]


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def devices_of(*gpus: tuple[str, int]) -> tuple[Device, ...]:
    return tuple(Device(number, f"GPU-{number}", name, mib / 1024) for number, (name, mib) in enumerate(gpus))


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> MachineOf:
    """Let `auto` see a machine with these GPUs; the driver itself is faked in the last tests of this file."""

    def replace(*gpus: tuple[str, int], **fields: Any) -> None:
        machine = Machine(devices=devices_of(*gpus), **fields)
        monkeypatch.setattr(choose_shape, "this_machine", lambda: machine)

    return replace


def plan_of(*overrides: str, recipe: str = SFT, model: dict[str, Any] | None = None) -> Plan:
    path = write_small(Path(), recipe)
    if model is not None:
        Path("model/config.json").write_text(json.dumps(model))
    return make_plan(load_recipe(path, ["shape=auto", *overrides]))


def refusal_of(*overrides: str, recipe: str = SFT, model: dict[str, Any] | None = None) -> str:
    with pytest.raises(ShapeError) as caught:
        plan_of(*overrides, recipe=recipe, model=model)
    return str(caught.value)


def test_eight_billion_parameters_at_2048_tokens_land_on_one_h100_with_checkpointing(machine_of):
    machine_of()
    plan = plan_of(*LONG, model=EIGHT_B)
    assert plan.shape.name == "h100x1"
    assert plan.recipe.model.gradient_checkpointing
    assert plan.origins["model.gradient_checkpointing"] == "auto"
    _, checkpointing, elsewhere = plan.warnings  # the first: a step has more rows than the file
    assert checkpointing.startswith("gradient checkpointing is switched on, since h100x1 has 79 GiB per device: ")
    assert elsewhere.startswith("this machine has no GPU: the shape h100x1 (1 x H100-80G) is for another machine.")
    assert plan.memory is not None
    assert plan.memory.fits


def test_the_identity_is_that_of_the_recipe_without_checkpointing(machine_of):
    machine_of(H100)
    plan = plan_of(*LONG, model=EIGHT_B)
    assert plan.recipe.model.gradient_checkpointing
    other = plan_of(*LONG, "model.gradient_checkpointing=false", "shape=h100x8_vllm2", model=EIGHT_B)
    assert not other.recipe.model.gradient_checkpointing
    assert plan.identity_hash == other.identity_hash


def test_checkpointing_that_the_user_switched_off_stays_off(machine_of):
    machine_of()
    plan = plan_of(*LONG, "model.gradient_checkpointing=false", model=EIGHT_B)
    assert not plan.recipe.model.gradient_checkpointing
    assert plan.origins["model.gradient_checkpointing"] == "--set"
    assert plan.shape.gpus > 1


def test_a_small_model_on_a_machine_with_a_gpu_does_not_train_on_the_cpu(machine_of):
    machine_of(RTX_4090)
    plan = plan_of()
    assert (plan.shape.name, plan.shape.device) == ("rtx4090x1", "cuda")
    assert plan.origins["shape"] == "auto: the smallest of this machine that fits"
    assert plan.warnings == []
    machine_of()
    assert (plan_of().shape.name, plan_of().warnings) == ("cpu", [])


def test_a_gpu_of_an_unknown_kind_makes_a_shape_of_its_own(machine_of):
    machine_of(RTX_4070)
    shape = plan_of().shape
    # 16,376 MiB are 15.99 GiB; half a GiB is reserved, and 15.49 rounds down to 15
    assert (shape.name, shape.device_name, shape.gpu_memory_gib) == ("rtx4070tisuperx1", "RTX 4070 Ti SUPER", 15.0)
    assert plan_of("shape=rtx4070tisuperx1").shape == shape


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        ([RTX_4090], ["rtx4090x1"]),
        ([RTX_4090] * 3, ["rtx4090x1", "rtx4090x2_dp", "rtx4090x2", "rtx4090x3_dp", "rtx4090x3"]),
        ([RTX_3090, RTX_4090], ["mixedx1", "mixedx2_dp", "mixedx2"]),
        ([H100] * 2, ["h100x1", "h100x2_dp", "h100x2"]),
        ([], []),
    ],
)
def test_shapes_are_those_of_one_two_four_eight_and_all_devices(gpus, names):
    assert [shape.name for shape in machine_shapes(devices_of(*gpus))] == names


def test_shapes_that_have_a_file_are_taken_from_it():
    by_name = {shape.name: shape for shape in machine_shapes(devices_of(*[H100] * 8))}
    files = {shape.name: shape for shape in all_shapes()}
    assert by_name["h100x8"] == files["h100x8"]
    assert by_name["h100x8_dp"] == files["h100x8_dp"]
    assert "h100x8_vllm2" not in by_name


def test_different_gpus_count_as_the_one_with_least_memory():
    small = ("NVIDIA T4", 15360)
    assert {shape.gpu_memory_gib for shape in machine_shapes(devices_of(RTX_3090, small))} == {14.5}


def test_a_partitioned_gpu_is_one_device():
    instances = [Device(0, f"MIG-{number}", "NVIDIA H100 MIG 3g.40gb", 39.5, is_mig=True) for number in range(2)]
    (shape,) = machine_shapes(instances)
    assert (shape.gpus, shape.gpu_memory_gib) == (1, 39.0)


def test_one_device_is_tried_with_checkpointing_before_two(machine_of):
    machine_of(*[("NVIDIA RTX A6000", 49140)] * 2)
    plan = plan_of(*LONG, model=EIGHT_B)
    assert (plan.shape.name, plan.recipe.model.gradient_checkpointing) == ("a6000x1", True)


def test_more_devices_are_taken_before_the_model_is_changed_and_the_change_is_suggested(machine_of):
    bigger = EIGHT_B | {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 17408}
    machine_of(*[RTX_4090] * 8)
    plan = plan_of(*LONG, model=bigger)
    assert plan.shape.gpus > 1
    assert plan.recipe.model.quantization is None
    note = plan.warnings[-1]
    assert note.startswith("fewer devices would do, with another model: `model.quantization: nf4` and `--shape ")
    changed = plan_of(*LONG, "model.quantization=nf4", model=bigger)
    assert changed.shape.gpus < plan.shape.gpus
    assert f"`--shape {changed.shape.name}`" in note


def test_quantization_is_suggested_where_nothing_else_fits(machine_of):
    machine_of(RTX_4090)
    bigger = EIGHT_B | {"num_hidden_layers": 48}
    lines = refusal_of(*LONG, model=bigger).splitlines()
    assert lines[0] == "--set shape: no training shape of this machine fits 10.5 B parameters at 2,048 tokens:"
    assert any("`model.quantization: nf4`" in line for line in lines), lines
    assert any("`--shape h100x1`" in line for line in lines), lines
    changed = plan_of(*LONG, "model.quantization=nf4", model=bigger)
    assert changed.shape.name == "rtx4090x1"


def test_a_machine_whose_driver_does_not_answer_is_not_taken_for_one_without_gpu(machine_of):
    machine_of(problem="the GPU driver does not answer: reboot.")
    assert refusal_of() == (
        "--set shape: `auto` cannot choose a shape: the GPU driver does not answer: reboot.\n"
        "Or name a shape: `--shape cpu` trains on the CPU. See also `trainer doctor`."
    )
    assert plan_of("shape=cpu").shape.name == "cpu"


def test_gpus_that_are_hidden_are_not_used_and_are_mentioned(machine_of):
    machine_of(hidden=2)
    assert plan_of().shape.name == "cpu"
    (note,) = plan_of("data.max_seq_tokens=70000").warnings
    assert note.startswith("this machine has no GPU that CUDA_VISIBLE_DEVICES shows: the shape h100x1 ")


def test_the_local_sampler_takes_shapes_that_do_not_shard(machine_of):
    machine_of(*[RTX_4090] * 2)
    assert plan_of(recipe=RFT).shape.name == "rtx4090x1"


@pytest.mark.parametrize("name", ["rtx4090", "h100", "a100_40g"])
def test_shapes_of_a_known_device_have_the_catalogs_memory(name):
    device = known_devices()[name]
    assert {shape.gpu_memory_gib for shape in made_shapes(name, device.device_name, device.memory_gib)} == {
        device.memory_gib
    }


@pytest.mark.parametrize(
    ("variables", "shape"),
    [({}, "rtx4090x1"), ({"CUDA_VISIBLE_DEVICES": "1"}, "rtx4090x1"), ({"CUDA_VISIBLE_DEVICES": ""}, "cpu")],
)
def test_check_asks_the_driver(tmp_path, variables, shape):
    environment = fake_nvml(tmp_path, RTX_4090, RTX_4090) | variables
    recipe = write_small(tmp_path, SFT.replace("shape: cpu\n", ""))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "check", str(recipe), "--json"],
        env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["shape"]["name"] == shape
