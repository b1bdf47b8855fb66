"""Tokenized rows in memory-mapped files: 5 bytes a token on disk, none in memory until a row is read."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, final

import numpy as np

from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.types import Row

INDEX: Final = "index.json"
"""Written last: a directory without it is incomplete."""
TYPES: Final = {
    "token_ids": "int32",  # T: of all sequences
    "loss_mask": "bool",  # T
    "ends": "int64",  # S: where each sequence ends in the two above
    "weights": "float64",  # S: of each trained token of the sequence
    "row_ends": "int64",  # R: where each row ends among the sequences
    "files": "int32",  # R: number of the row's file
    "lines": "int64",  # R: its line there
}
"""Type of each file; T tokens, S sequences, R rows."""


@final
@dataclass(frozen=True)
class TokenCounts:
    """What became of the rows of a source.

    10 rows of which 5 are dropped, and one became 3 sequences: 10 read, 5 dropped, 1 split, 7 sequences.
    """

    num_read: int = 0
    """Rows read, dropped ones included."""
    num_truncated: int = 0
    num_dropped: int = 0
    num_split: int = 0
    """Rows of more than one sequence."""
    num_respaced: int = 0
    """Rows with trained text of which the template removes or changes white space."""
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        ours, theirs = asdict(self), asdict(other)
        return TokenCounts(**{name: ours[name] + theirs[name] for name in ours})


@final
@dataclass(frozen=True)
class EncodedChunk:
    """Some rows as arrays, as a process that tokenizes hands them on; see `TYPES`."""

    counts: TokenCounts
    token_ids: bytes
    loss_mask: bytes
    lengths: Sequence[int]
    """Tokens of each sequence."""
    weights: Sequence[float]
    """Of each sequence."""
    sizes: Sequence[int]
    """Sequences of each row that is kept."""
    places: Sequence[tuple[str, int]]
    """File and line of each row that is kept."""

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[Row, tuple[TokenSequence, ...]]],
        *,
        num_read: int,
        num_truncated: int,
        num_respaced: int,
    ) -> EncodedChunk:
        """Pack rows that are kept, with their sequences.

        Args:
            rows: those that are kept.
            num_read: rows of the chunk, dropped ones included.
            num_truncated: how many rows were truncated.
            num_respaced: of how many the template changes white space.
        """
        sequences = [sequence for _, of_row in rows for sequence in of_row]
        token_ids = array("i", [token for sequence in sequences for token in sequence.token_ids])
        counts = TokenCounts(
            num_read=num_read,
            num_truncated=num_truncated,
            num_dropped=num_read - len(rows),
            num_split=sum(len(of_row) > 1 for _, of_row in rows),
            num_respaced=num_respaced,
            num_sequences=len(sequences),
            num_tokens=len(token_ids),
            num_trained=sum(sequence.num_trained for sequence in sequences),
        )
        return cls(
            counts=counts,
            token_ids=token_ids.tobytes(),
            loss_mask=b"".join(bytes(sequence.loss_mask) for sequence in sequences),
            lengths=[len(sequence.token_ids) for sequence in sequences],
            weights=[next(iter(sequence.inputs.weights), 1.0) for sequence in sequences],
            sizes=[len(of_row) for _, of_row in rows],
            places=[(row.file, row.line) for row, _ in rows],
        )


@final
class TableWriter:
    """Writes the files of a `TokenTable` chunk by chunk; keeps nothing of them in memory but the names of files."""

    def __init__(self, directory: Path) -> None:
        """Create the files in an existing directory."""
        self._directory = directory
        self._open = ExitStack()
        self._files = {name: self._open.enter_context((directory / name).open("wb")) for name in TYPES}
        self._names: dict[str, int] = {}
        self.counts = TokenCounts()
        self.num_rows = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def append(self, chunk: EncodedChunk) -> None:
        """Write the next rows."""
        files = [self._names.setdefault(file, len(self._names)) for file, _ in chunk.places]
        self._files["token_ids"].write(chunk.token_ids)
        self._files["loss_mask"].write(chunk.loss_mask)
        self._write("ends", np.cumsum(chunk.lengths, dtype="int64") + self.counts.num_tokens)
        self._write("weights", chunk.weights)
        self._write("row_ends", np.cumsum(chunk.sizes, dtype="int64") + self.counts.num_sequences)
        self._write("files", files)
        self._write("lines", [line for _, line in chunk.places])
        self.counts += chunk.counts
        self.num_rows += len(chunk.sizes)

    def _write(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=TYPES[name]).tobytes())

    def finish(self) -> None:
        """Write the index, which makes the directory a table."""
        self._open.close()
        index = {"num_rows": self.num_rows, "counts": asdict(self.counts), "files": list(self._names)}
        (self._directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


@final
class TokenTable:
    """Rows as token sequences, read from memory-mapped files when they are asked for."""

    def __init__(self, directory: Path) -> None:
        """Map the files of a directory.

        Raises:
            ValueError: the files are not those of a whole table.
            OSError: a file is missing or cannot be read.
        """
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        self.counts = TokenCounts(**index["counts"])
        self._names: list[str] = index["files"]
        self._num_rows: int = index["num_rows"]
        counts, rows = self.counts, self._num_rows

        def mapped(name: str, length: int) -> np.ndarray[Any, Any]:
            return np.memmap(directory / name, dtype=TYPES[name], mode="r", shape=(length,))

        sizes = {"token_ids": counts.num_tokens, "loss_mask": counts.num_tokens}
        sizes |= {"ends": counts.num_sequences, "weights": counts.num_sequences}
        sizes |= {"row_ends": rows, "files": rows, "lines": rows}
        for name, length in sizes.items():
            expected = length * np.dtype(TYPES[name]).itemsize
            if (directory / name).stat().st_size != expected or not length:
                raise ValueError(f"{directory / name}: does not have the {expected:,} bytes that {INDEX} says")
        self._token_ids, self._loss_mask = (
            mapped("token_ids", sizes["token_ids"]),
            mapped("loss_mask", sizes["loss_mask"]),
        )
        self._ends, self._weights = mapped("ends", sizes["ends"]), mapped("weights", sizes["weights"])
        self._row_ends, self._files = mapped("row_ends", rows), mapped("files", rows)
        self._lines = mapped("lines", rows)

    @property
    def num_rows(self) -> int:
        """Rows that are trained."""
        return self._num_rows

    def sequences_of(self, rows: Collection[int]) -> list[int]:
        """Numbers of the sequences of some rows, in their order; a row has more than one where turns are rewritten."""
        return [number for row in rows for number in range(self._first(self._row_ends, row), int(self._row_ends[row]))]

    def by_row(self, sequences: Sequence[int]) -> list[list[int]]:
        """Numbers of sequences, those of one row together; a row that comes twice counts twice."""
        units: list[list[int]] = []
        before = (-1, -1)
        for number, row in zip(
            sequences, np.searchsorted(self._row_ends, sequences, side="right").tolist(), strict=True
        ):
            if units and before == (number - 1, row):
                units[-1].append(number)
            else:
                units.append([number])
            before = (number, row)
        return units

    def lengths(self, sequences: Sequence[int]) -> list[int]:
        """Tokens of each of some sequences."""
        return [int(self._ends[number]) - self._first(self._ends, number) for number in sequences]

    def sequence(self, number: int) -> TokenSequence:
        """One sequence, with file and line of its row."""
        part = slice(self._first(self._ends, number), int(self._ends[number]))
        loss_mask = tuple(self._loss_mask[part].tolist())
        weights = (float(self._weights[number]),) * sum(loss_mask[1:])
        row = int(np.searchsorted(self._row_ends, number, side="right"))
        return TokenSequence(
            tuple(self._token_ids[part].tolist()), loss_mask, TokenInputs(weights=weights), self._source(row)
        )

    def rows_at(self, sources: Collection[str]) -> set[int]:
        """The rows of these files and lines, such as `rows.jsonl:7`."""
        return {int(row) for source in sources for row in self._rows_at(source)}

    def _rows_at(self, source: str) -> Iterator[int]:
        file, _, line = source.rpartition(":")
        if file in self._names and line.isdigit():
            number = self._names.index(file)
            yield from np.flatnonzero((self._lines == int(line)) & (self._files == number)).tolist()

    def _source(self, row: int) -> str:
        return f"{self._names[int(self._files[row])]}:{int(self._lines[row])}"

    @staticmethod
    def _first(ends: np.ndarray[Any, Any], number: int) -> int:
        return int(ends[number - 1]) if number else 0
