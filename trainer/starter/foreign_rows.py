"""Where other tools say which rows to train on: Axolotl's `datasets`, LLaMA-Factory's dataset_info.json, TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from trainer.config.foreign_names import NO_PREFERENCES
from trainer.errors import UserError
from trainer.starter.translation import Translation, Value

COLUMN_NAMES: Final = {"prompt": "instruction", "query": "input", "response": "output"}
"""LLaMA-Factory's names of columns of alpaca rows, and ours; others are equal."""


def axolotl_rows(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    """Axolotl's list of data sets."""
    ours = "data.eval" if name == "test_datasets" else "data.train"
    sources, columns = list[Value](), dict[str, str]()
    for each in value if isinstance(value, list) else [value]:
        spec = {"path": each} if isinstance(each, str) else dict(each)
        sources += _axolotl_source(told, name, spec)
        columns |= _axolotl_columns(told, spec)
    if sources:
        told.put(name, ours, sources[0] if len(sources) == 1 else sources)
    if columns:
        told.put(name, "data.columns", columns)


def _axolotl_source(told: Translation, name: str, spec: Mapping[str, Value]) -> list[Value]:
    kind = spec.get("type")
    if kind == "completion":
        told.put(f"{name}.type", "data.format", "text")
    elif isinstance(kind, Mapping) or (isinstance(kind, str) and not kind.startswith(("alpaca", "sharegpt", "chat_"))):
        told.leave(f"{name}.type", kind, "compare what the rows become with `trainer check RECIPE --data`")
    files = spec.get("data_files")
    if files:
        return list(files) if isinstance(files, list) else [files]
    if not spec.get("path"):
        told.leave(name, dict(spec), "names no path; write its rows as data.train")
        return []
    return [_source(str(spec["path"]), spec.get("name"), spec.get("split"), spec.get("revision"))]


def _axolotl_columns(told: Translation, spec: Mapping[str, Value]) -> dict[str, str]:
    mapped = dict(spec.get("message_property_mappings") or {})
    names = {
        "messages": spec.get("field_messages"),
        "role": spec.get("message_field_role") or mapped.get("role"),
        "content": spec.get("message_field_content") or mapped.get("content"),
    }
    known = {"messages": {"messages", "conversations"}, "role": {"role", "from"}, "content": {"content", "value"}}
    return {ours: theirs for ours, theirs in names.items() if theirs and theirs not in known[ours]}


def _source(path: str, config: Value = None, split: Value = None, revision: Value = None) -> Value:
    """A file as its path, a hub data set as a mapping."""
    is_file = (
        Path(path).exists()
        or path.startswith((".", "/"))
        or Path(path).suffix.startswith((".json", ".parquet", ".csv"))
    )
    if is_file:
        return path
    told = {"hub": path, "config": config, "split": split, "revision": revision}
    return {name: value for name, value in told.items() if value is not None}


def llamafactory_rows(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    """LLaMA-Factory's names in dataset_info.json."""
    directory = Path(str(given.get("dataset_dir", "data")))
    info_file = directory / "dataset_info.json"
    names = [each.strip() for each in value.split(",")] if isinstance(value, str) else list(value)
    info = _info(info_file)
    sources = []
    for each in names:
        spec = info.get(each)
        if spec is None:
            told.leave(name, each, f"not in {info_file}; write the file of its rows as data.train")
            sources.append(each if "." in each else f"{each}.jsonl")
            continue
        if spec.get("ranking"):
            raise UserError(f"{each} ({info_file}): {NO_PREFERENCES}")
        _info_columns(told, each, spec)
        file = spec.get("file_name")
        sources.append(
            str(directory / file)
            if file
            else _source(str(spec.get("hf_hub_url")), spec.get("subset"), spec.get("split"))
        )
    ours = "data.eval" if name == "eval_dataset" else "data.train"
    told.put(name, ours, sources[0] if len(sources) == 1 else sources)


def _info(file: Path) -> dict[str, Value]:
    """The content of dataset_info.json; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be an object of data sets")
    return content


def _info_columns(told: Translation, name: str, spec: Mapping[str, Value]) -> None:
    pairs = {COLUMN_NAMES.get(theirs, theirs): column for theirs, column in (spec.get("columns") or {}).items()}
    renamed = {ours: column for ours, column in pairs.items() if ours != column and column != "conversations"}
    if renamed:
        told.put(f"{name}.columns", "data.columns", renamed)
    if spec.get("tags"):
        told.leave(f"{name}.tags", spec["tags"], "compare with `trainer check RECIPE --data`; see data.columns")


def trl_rows(told: Translation, name: str, value: Value, given: Mapping[str, Value]) -> None:
    """TRL's `dataset_name`, a hub name or a file."""
    told.put(name, "data.train", _source(str(value), given.get("dataset_config"), given.get("dataset_train_split")))
