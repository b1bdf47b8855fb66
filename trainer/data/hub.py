"""Rows from a Hugging Face data set, where a hub or a local copy is reachable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.recipe import DataSource
from trainer.errors import DataError


def read_hub(source: DataSource) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number from 1, fields) of every row.

    Raises:
        DataError: the data set cannot be loaded, with the reason and what to do.
    """
    import datasets

    if source.hub is None:
        raise DataError(f"{source.path}: no such file. Set data.train.path, or data.train.hub.")
    try:
        loaded = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises whatever its back ends raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data set {source.hub}: cannot be loaded ({type(error).__name__}: {reason:.200}).\n"
            f"Where no hub is reachable, put the rows in a JSONL file and set data.train.path"
            + (f" (now {source.path}, which does not exist)." if source.path else ".")
        ) from None
    yield from enumerate(loaded, start=1)
