"""Which files a data source names, by name alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from trainer.config.recipe import DataSource

JSON_ENDINGS: Final = (".jsonl", ".json", ".ndjson")
ARROW_ENDINGS: Final = (".parquet", ".csv", ".tsv", ".arrow")
COMPRESSED: Final = (".gz", ".zst")
READ_ENDINGS: Final = (*JSON_ENDINGS, *ARROW_ENDINGS)

MODEL_FILES: Final = ("config.json", "tokenizer.json")
"""Files by which a directory of a model is known, whose .json files are no rows."""


def ending_of(file: Path) -> str:
    """The ending that says what a file is: `.jsonl` of `rows.jsonl.gz`."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def source_files(source: DataSource) -> list[Path]:
    """The files of a source in the order they are read; empty where nothing of the path exists.

    A path is a file, a directory (its files by name, or the whole where `save_to_disk` wrote it) or a glob.
    """
    if source.path is None:
        return []
    path = Path(source.path)
    if path.is_file() or is_saved_dataset(path):
        return [path]
    if any((path / name).is_file() for name in MODEL_FILES):
        return []
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.is_file() and _is_data(file)]
    if any(letter in source.path for letter in "*?["):
        base = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        return sorted(file for file in base.glob(pattern) if file.is_file() or is_saved_dataset(file))
    return []


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote the directory."""
    return path.is_dir() and (
        (path / "dataset_dict.json").is_file()
        or ((path / "dataset_info.json").is_file() and (path / "state.json").is_file())
    )


def _is_data(file: Path) -> bool:
    is_hidden = file.name.startswith((".", "_"))
    return not is_hidden and ending_of(file) in READ_ENDINGS
