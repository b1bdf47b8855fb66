"""What a GPU would run, without a GPU: kernels fit the card, and compute what the CPU computes.

scripts/lower compiles down to machine code; Triton's interpreter runs small sizes. Both need Triton, which comes with
torch for GPUs; scripts/setup_triton puts it beside a torch for CPUs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from trainer.model.flash_choice import VERSION
from trainer.planning.model_facts import ModelFacts
from trainer.planning.roofline import LAUNCHES, adapter_bytes, elementwise_bytes

ROOT: Final = Path(__file__).parents[2]
RECORDED: Final = ROOT / "benchmarks" / "results" / "lowering_sm_90.json"
TOLERANCE: Final = {"float32": 5e-6, "float16": 3e-3}
SHARED_BYTES: Final = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
INTERPRETED: Final = ("plain", "window", "cap", "sinks", "tree", "unpadded", "short", "changing")

LLAMA: Final = ModelFacts(
    hidden=4096, layers=32, query_width=4096, key_width=1024, intermediate=14_336, vocab=128_256, is_tied=False
)

TRITON: Final = ROOT / ".venv-triton"
"""Beside the environment, where nothing else finds it."""

pytestmark = pytest.mark.skipif(
    not TRITON.is_dir() and importlib.util.find_spec("triton") is None, reason="needs Triton: scripts/setup_triton"
)

needs_flash = pytest.mark.skipif(not (ROOT / ".venv-flash" / "flash_attn").is_dir(), reason="needs scripts/setup_flash")


def run(*command: str, **variables: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(TRITON), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def lowered(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    run(str(ROOT / "scripts" / "lower.py"), *arguments, "--json", str(tmp_path / "rows.json"))
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    return rows


def interpreted(*cases: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(run("-m", "interpreted", *cases, TRITON_INTERPRET="1"))
    return found


def assert_fits(rows: list[dict[str, Any]], card: str) -> None:
    for row in rows:
        assert row["shared_bytes"] <= SHARED_BYTES[card], row


def assert_no_worse(rows: list[dict[str, Any]]) -> None:
    """Registers are spilled today where FlexAttention chooses large blocks: each kernel at most as much as recorded."""
    recorded: dict[tuple[str, str], int] = {}
    for row in json.loads(RECORDED.read_text()):
        if "kernel" in row:
            key = (row["of"], row["pass"])
            recorded[key] = max(recorded.get(key, 0), row["spilled_bytes"])
    missing = {row["of"] for row in rows if (row["of"], row["pass"]) not in recorded}
    for row in rows:
        assert row["of"] in missing or row["spilled_bytes"] <= 1.05 * recorded[row["of"], row["pass"]], row
    assert not missing, f"fit, but are not recorded in {RECORDED.name}: write it again with scripts/lower --json"


def test_a_small_attention_compiles_for_hopper_without_local_memory(tmp_path):
    rows = lowered(tmp_path, "--parts", "attention", "--only", "4/2x16 window")
    assert {row["pass"] for row in rows} == {"forward", "backward", "inference"}
    assert_fits(rows, "sm_90")
    assert all(row["spilled_bytes"] == row["stack_bytes"] == 0 for row in rows)
    assert {row["tensor_cores"] for row in rows if "_tem_" in row["kernel"]} == {"wgmma.mma_async"}


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_forms_of_attention_compute_what_the_cpu_computes(dtype):
    for name, differences in interpreted(*(f"{form}.{dtype}" for form in INTERPRETED)).items():
        assert set(differences) == {"output", "dQ", "dK", "dV"}
        assert all(difference < TOLERANCE[dtype] for difference in differences.values()), (name, differences)


@pytest.mark.heavy
def test_inference_mode_runs_the_kernels_of_no_grad():
    code = (
        "import torch; from geometries import GEOMETRIES, programs_of; from lowered_kernels import kernels_of\n"
        "from lowering import CARDS\n"
        "modes = torch.no_grad, torch.inference_mode\n"
        "ours = [programs_of(GEOMETRIES[1], CARDS['sm_90'], contexts=[mode]) for mode in modes]\n"
        "assert [len(each) for each in ours] == [1, 1]\n"
        "assert kernels_of(ours[0][0]) == kernels_of(ours[1][0])"
    )
    run("-c", code)


@pytest.mark.heavy
def test_a_layer_computes_what_the_cpu_computes():
    """With its norms, rotary embedding, gate and adapters, in the kernels of the GPU; all gradients."""
    for name, differences in interpreted("layer.llama", "layer.qwen3", "layer.gemma2", "layer.llama.full").items():
        assert all(difference < 2e-5 for difference in differences.values()), (name, differences)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_of_adapters_compute_what_torch_computes(dtype):
    """With equal bits at a second launch. Rank 16 fills the columns that a kernel computes; 4 and 24 do not."""
    found = interpreted(*(f"adapters.{dtype}.{rank}" for rank in (4, 16, 24)))
    for differences in found.values():
        assert set(differences) == {"gradients", "swiglu", "swiglu_gradients"}
        assert all(difference < TOLERANCE[dtype] for difference in differences.values()), found


def test_products_of_adapters_fit_hopper_without_local_memory(tmp_path):
    """Those that are as wide as a model use its matrix instructions."""
    rows = lowered(tmp_path, "--parts", "adapters")
    wide = {"gradients", "swiglu", "swiglu_gradients"}
    assert {row["kernel"] for row in rows} == {*wide, *(f"sum_{name}" for name in wide)}
    assert_fits(rows, "sm_90")
    assert all(row["spilled_bytes"] == row["stack_bytes"] == 0 for row in rows)
    assert {row["tensor_cores"] for row in rows if row["kernel"] in wide} == {"wgmma.mma_async"}


@pytest.mark.heavy
def test_every_geometry_of_a_known_model_fits_hopper(tmp_path):
    rows = lowered(tmp_path, "--parts", "attention", "head")
    assert_fits(rows, "sm_90")
    assert_no_worse(rows)
    assert {row["tensor_cores"] for row in rows if "_tem_" in row["kernel"]} == {"wgmma.mma_async"}


@needs_flash
def test_flash_attention_of_llama_compiles_for_hopper_without_local_memory(tmp_path):
    rows = lowered(tmp_path, "--parts", "flash", "--only", "24/8x128")
    assert [row["pass"] for row in rows] == ["forward", "backward"] * 2, "of sequences, and of branches to prefixes"
    assert_fits(rows, "sm_90")
    for row in rows:
        assert row["spilled_bytes"] == row["stack_bytes"] == 0 < row["shared_bytes"], row
        assert row["tensor_cores"] == "wgmma.mma_async"


@needs_flash
@pytest.mark.heavy
@pytest.mark.parametrize("card", ["sm_90", "sm_100"])
def test_flash_attention_of_known_models_compiles(tmp_path, card):
    """On Blackwell all but heads of 256 with a soft cap or a window; FlexAttention computes those."""
    rows = lowered(tmp_path, "--card", card, "--parts", "flash")
    refused = {row["of"] for row in rows if "refused" in row}
    assert refused == set() if card == "sm_90" else all("256" in name for name in refused)
    assert len({row["of"] for row in rows} - refused) > 20
    assert_fits([row for row in rows if row["of"] not in refused], card)


def test_the_version_of_the_extra_is_the_one_that_is_called():
    assert f'"flash-attn-4=={VERSION}"' in (ROOT / "pyproject.toml").read_text()
    assert f"flash-attn-4=={VERSION}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.heavy
@pytest.mark.parametrize("card", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", ["9/3x64", "32/8x128", "8/4x256 window 4096 cap 50"])
def test_large_and_small_heads_fit_other_cards(tmp_path, card, name):
    assert_fits(lowered(tmp_path, "--card", card, "--parts", "attention", "--only", name), card)


@pytest.mark.heavy
def test_layers_keep_their_budget_of_kernels_and_bytes(tmp_path):
    """Of a layer of Llama-3.1-8B with 4,096 tokens. Narrow: the bytes of all kernels but attention and base products.

    Two of the compiler's kernels stack the A of joined layers. The roofline predicts these launches and bytes.
    """
    rows = lowered(tmp_path, "--parts", "layers", "--only", "Llama-3.1-8B LoRA")
    found = {(row["of"], row["pass"]): row for row in rows if "launches" in row}
    assert all(row["foreign_addmms"] == 0 for row in found.values())
    llama = {kind: found["Llama-3.1-8B LoRA", kind] for kind in ("forward", "backward", "inference")}
    assert [llama[kind]["triton_launches"] for kind in llama] == [8, 5, 9]
    assert [llama[kind]["launches"] for kind in llama] == [22, 24, 23]
    assert llama["forward"]["narrow_gigabytes"] < 1.15
    assert llama["backward"]["narrow_gigabytes"] < 1.68
    assert_fits([row for row in rows if "kernel" in row], "sm_90")

    counted = 1e9 * (llama["forward"]["narrow_gigabytes"] + llama["backward"]["narrow_gigabytes"])
    predicted = elementwise_bytes(LLAMA, 4096, is_compiled=True) + adapter_bytes(LLAMA, 4096, 16, is_compiled=True)
    assert predicted == pytest.approx(counted, rel=0.03)  # rotary embedding and attention read a part of q, k, v
    assert LAUNCHES["compiled LoRA"] == llama["forward"]["launches"] + llama["backward"]["launches"]


@pytest.mark.heavy
def test_a_sharded_layer_has_the_kernels_of_a_whole_one() -> None:
    """To the character, so with the same sizes as constants; operators differ in the base weights that they get."""
    found = json.loads(run("-m", "lowered_sharded"))
    assert found["sharded"] == found["whole"]
    kernels = {kind: len(program["kernels"]) for kind, program in found["sharded"].items()}
    assert kernels == {"forward": 8, "backward": 5}
    assert found["sharded"]["forward"]["operators"] == [
        "trainer.lora_group",
        "trainer.lora_product",
        "trainer.lora_mlp",
    ]
