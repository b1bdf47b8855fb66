"""Twelve families of `scripts/model_matrix` that train rightly by every method that they are not refused for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
DENSE: Final = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2")
MIXTURES: Final = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
FULL: Final = "full-parameter training of mixture-of-experts models needs a router loss; use LoRA"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The matrix of the twelve, by family; one process measures all."""
    out = tmp_path_factory.mktemp("matrix")
    command = [sys.executable, "scripts/model_matrix.py", "--fresh", "--out", str(out), "--only", *DENSE, *MIXTURES]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    table = (out / "models.md").read_text()
    assert all(f"| {family} |" in table for family in (*DENSE, *MIXTURES))
    return {record["family"]: record for record in json.loads((out / "models.json").read_text())["families"]}


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_family_trains_as_plain_transformers_would(records: dict[str, dict[str, Any]], family: str) -> None:
    assert records[family]["verdicts"] == {method: ["RIGHT", ""] for method in ("sft", "rft", "full")}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_trains_with_adapters_as_plain_peft_would(records: dict[str, dict[str, Any]], family: str) -> None:
    verdicts = records[family]["verdicts"]
    assert verdicts == {"sft": ["RIGHT", ""], "rft": ["RIGHT", ""], "full": ["REFUSED", FULL]}


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
def test_no_logprob_depends_on_a_neighbour(records: dict[str, dict[str, Any]], family: str) -> None:
    assert records[family]["numbers"]["leak"] == 0.0
