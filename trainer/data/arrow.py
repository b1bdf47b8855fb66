"""Rows from CSV, Parquet, saved data sets and the hub, read by the `datasets` library."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import DataSource
from trainer.config.source_files import ending_of
from trainer.errors import DataError

LOADERS: Final = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
"""Loader of the `datasets` library by file ending."""
PARQUET_ROWS: Final = 512


def read_table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number from 1, fields) of every row of a CSV, TSV, Parquet or Arrow file.

    Raises:
        DataError: the file cannot be read as what its name says.
    """
    ending = ending_of(path)
    if ending == ".parquet":
        yield from _parquet_rows(path)
        return
    import datasets

    datasets.disable_progress_bars()
    options: dict[str, Any] = {"sep": "\t"} if ending == ".tsv" else {}
    try:
        if LOADERS[ending] == "csv":  # "NA" and "17" are texts
            options |= {"keep_default_na": False, "features": _texts_of(path, "\t" if ending == ".tsv" else ",")}
        loaded = datasets.load_dataset(LOADERS[ending], data_files=[str(path)], split="train", **options)
    except Exception as error:  # the library raises whatever its back ends raise
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {LOADERS[ending].upper()}: {_reason(cause)}") from None
    for number, row in numbered(loaded):
        yield number, _with_number(row, f"{path}:{number}") if LOADERS[ending] == "csv" else row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a Parquet file, some hundred at a time: the first ones come at once, and nothing is copied to a cache."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from numbered(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as PARQUET: {_reason(error)}") from None


def _texts_of(path: Path, delimiter: str) -> Any:
    """Every column of a CSV file as text."""
    import datasets

    with (
        gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file
    ):
        header = next(csv.reader(file, delimiter=delimiter), [])
    return datasets.Features({name: datasets.Value("string") for name in header})


def _with_number(row: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The row of a CSV file with its `weight` as a number."""
    if not row.get("weight"):
        return {name: value for name, value in row.items() if name != "weight"}
    try:
        return {**row, "weight": float(row["weight"])}
    except ValueError:
        raise DataError(f"{source}: weight must be a number of 0 or more (got {row['weight']!r:.60})") from None


def read_saved(path: Path, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number from 1, fields) of a directory that `datasets` wrote with `save_to_disk`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise DataError(f"{path}: cannot be read as a saved data set: {_reason(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: has no split `{split}`; it has {', '.join(loaded)}. Set data.train.split.")
        loaded = loaded[split]
    yield from numbered(loaded)


def read_hub(source: DataSource) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number from 1, fields) of every row of a hub data set.

    Raises:
        DataError: the data set cannot be loaded, with the reason and what to do.
    """
    import datasets

    datasets.disable_progress_bars()
    if source.hub is None:
        raise DataError(f"{source.path}: no such file. Set data.train.path, or data.train.hub.")
    try:
        loaded = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # as above
        raise DataError(
            f"data set {source.hub}: cannot be loaded ({type(error).__name__}: {_reason(error)}).\n"
            f"Where no hub is reachable, put the rows in a JSONL file and set data.train.path"
            + (f" (now {source.path}, which does not exist)." if source.path else ".")
        ) from None
    yield from numbered(loaded)


def numbered(rows: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers from 1, without the nulls that Arrow puts where a field is absent."""
    for number, row in enumerate(rows, start=1):
        yield number, without_nulls(row)


def without_nulls(value: Any) -> Any:
    """The value without null fields, at every depth.

    A column of tool calls with different arguments has all names in each call, null where they are absent:

    >>> without_nulls({"arguments": {"city": "Oslo", "query": None}, "tags": [{"a": None}]})
    {'arguments': {'city': 'Oslo'}, 'tags': [{}]}
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def _reason(error: BaseException) -> str:
    return f"{str(error).splitlines()[0]:.200}" if str(error) else type(error).__name__
