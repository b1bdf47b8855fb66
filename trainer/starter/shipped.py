"""The files that ship with the package: the quickstart's recipes and rows, and the editor schema. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from trainer.errors import LaunchError, UserError
from trainer.files import write_atomically

PACKAGE: Final = Path(__file__).resolve().parent.parent
SCHEMA: Final = "recipe.schema.json"
QUICKSTART: Final = (
    "recipes/sft_quickstart.yaml",
    "recipes/rft_quickstart.yaml",
    "datasets/extract_train.jsonl",
    "datasets/extract_heldout.jsonl",
    "datasets/sums_train.jsonl",
    "datasets/sums_heldout.jsonl",
)
"""Paths in the repository, and in the user's directory."""
MODEL: Final = "models/SmolLM2-135M-Instruct"
"""The model of the quickstart; `prepare_model` makes it."""
SCHEMA_LINE: Final = "# yaml-language-server: $schema="


def shipped_file(name: str) -> Path:
    """The file of this path, in the repository or in the installed package.

    Args:
        name: path in the repository, such as `recipes/sft_quickstart.yaml`.

    Raises:
        LaunchError: the package is incomplete.
    """
    for directory in (PACKAGE.parent, PACKAGE):
        file = directory / name
        if file.is_file():
            return file
    raise LaunchError(f"{name} is missing in {PACKAGE}; install the package again")


def pages() -> dict[str, Path]:
    """The pages of the documentation by name: `data` is docs/data.md."""
    return {file.stem: file for file in sorted(shipped_file("docs/index.md").parent.glob("*.md"))}


def write_quickstart(directory: Path) -> Iterator[str]:
    """Write the quickstart's files; yields a line about each. A file that exists is kept.

    Args:
        directory: the user's.

    Raises:
        UserError: a file cannot be written.
    """
    for name in QUICKSTART:
        text = shipped_file(name).read_text(encoding="utf-8")
        if name.startswith("recipes/"):
            text = f"{SCHEMA_LINE}{SCHEMA}\n" + text.partition("\n")[2]
        yield _write_once(directory / name, text)
    yield write_schema(directory / "recipes")


def write_schema(directory: Path) -> str:
    """Write the schema that editors read beside a recipe; returns a line about it.

    Args:
        directory: of the recipe.

    Raises:
        UserError: it cannot be written.
    """
    return _write_once(directory / SCHEMA, shipped_file(f"docs/{SCHEMA}").read_text(encoding="utf-8"))


def _write_once(file: Path, text: str) -> str:
    if file.exists():
        return f"{file}: exists, kept"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Change to a directory that you may write to.") from None
    return f"{file}: written"
