"""Project directories: one of each test's own, and one that a file's tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from project import Project
from tiny import tiny_model_dir

collect_ignore = ["chaos", *([] if find_spec("tinker") else ["chaos_training_client.py", "tinker_smoke.py"])]
"""Python's own hook, and what starts workers by fork; clients that run in an interpreter with tinker."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows, made once."""
    return write_files(tmp_path_factory.mktemp("files"))


def write_files(root: Path) -> Path:
    """Put a tiny model and rows there."""
    tiny_model_dir(root / "model")
    for name, first in (("train", 0), ("eval", 100)):
        rows = [_row(number) for number in range(first, first + 24)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _row(number: int) -> dict[str, object]:
    """A sum; rows differ in length, prompt and answer."""
    question = f"what is the sum of {number} and {3 * number}?" + " please" * (number % 5)
    answer = f"the answer is {4 * number}." + " and 12 cats" * (number % 3)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_project(root: Path, files: Path) -> Iterator[Project]:
    shutil.copytree(files, root, dirs_exist_ok=True)
    project = Project(root.resolve())
    project.recipe()
    yield project
    project.kill_all()


@pytest.fixture
def project(tmp_path: Path, files: Path) -> Iterator[Project]:
    """A directory of the test's own."""
    yield from make_project(tmp_path, files)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Project]:
    """A directory that the tests of a file share, since a process start costs seconds."""
    yield from make_project(tmp_path_factory.mktemp("shared"), files)
