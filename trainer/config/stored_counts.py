"""Number of rows in Arrow files, saved data sets and the hub's local cache, without reading the rows."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from trainer.config.recipe import DataSource


def count_arrow_file(file: Path) -> int:
    """Return the rows of an Arrow file or stream, from the headers of its batches.

    Raises:
        ValueError: it is neither.
    """
    import pyarrow  # here, so that only Arrow files pay for the import

    with pyarrow.memory_map(str(file)) as mapped:
        try:
            stream = pyarrow.ipc.open_stream(mapped)
            return sum(batch.num_rows for batch in stream)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            opened = pyarrow.ipc.open_file(mapped)
            return sum(opened.get_batch(number).num_rows for number in range(opened.num_record_batches))


def count_saved(directory: Path, split: str) -> int | None:
    """Return the rows of a directory that `save_to_disk` wrote; None if it has no such split.

    Args:
        directory: of a data set, or of one directory for each split.
        split: which of them.
    """
    if (directory / "dataset_dict.json").is_file():
        directory = directory / split
    state = directory / "state.json"
    if not state.is_file():
        return None
    files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return sum(count_arrow_file(directory / file["filename"]) for file in files)


def count_hub(source: DataSource) -> int | None:
    """Return the rows of a hub data set that is a local directory or in the local cache; None if unknown.

    No server is asked: without a network its library would try for half a minute.
    """
    if source.hub is None:
        return None
    return _count_hub(source.hub, source.config, source.split, source.revision)


@lru_cache(maxsize=8)
def _count_hub(hub: str, config: str | None, split: str, revision: str | None) -> int | None:
    import datasets

    kept = datasets.DownloadConfig(local_files_only=True)
    try:
        if Path(hub).is_dir():
            return len(datasets.load_dataset(hub, config, split=split, revision=revision))
        builder = datasets.load_dataset_builder(hub, config, revision=revision, download_config=kept)
        return int(builder.info.splits[split].num_examples)
    except Exception:  # the library raises whatever its back ends raise; the run says what is wrong
        return None
