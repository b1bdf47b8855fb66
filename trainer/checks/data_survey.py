"""What a recipe's rows are as tokens: counts over all, pieces of some."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from transformers import PreTrainedTokenizerBase

from trainer.config.recipe import DataSource, Recipe
from trainer.data.chat import ENCODE_ROWS, ChatEncoder
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.errors import DataError
from trainer.types import Row

NO_LIMIT: Final = 1 << 40
NUM_BINS: Final = 8
SHOWN_TOKENS: Final = 2000
"""Of one row; longer ones are cut for display."""
HALF_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"


@final
@dataclass(frozen=True)
class Piece:
    """A token as text; one that ends within a character shows nothing, the next one shows it whole."""

    text: str
    is_trained: bool


@final
@dataclass(frozen=True)
class ShownRow:
    """A row as tokens."""

    where: str
    num_tokens: int
    num_trained: int
    note: str
    pieces: tuple[Piece, ...]


@final
@dataclass(frozen=True)
class Survey:
    """Counts over all rows of a source, and the first rows as tokens."""

    file: str
    unit: str
    """`row` (sft) or `prompt` (rft)."""
    num_rows: int
    num_tokens: int
    """Of the rows that are used, as they are used."""
    num_trained: int
    num_truncated: int
    num_dropped: int
    num_cramped: int
    """Prompts that leave less than `rollout.max_completion_tokens`."""
    refused: tuple[str, ...]
    """File, line and reason of each row that training would stop at."""
    lengths: tuple[int, ...]
    """Tokens of each row that is not refused for another reason than its length, before it is truncated."""
    longest: str
    """Where the longest row stands."""
    max_seq_tokens: int
    shown: tuple[ShownRow, ...]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        fields = asdict(self)
        del fields["lengths"], fields["shown"]
        return fields | {"longest_tokens": max(self.lengths, default=0), "histogram": dict(self.histogram())}

    def table(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        share = f" ({self.num_trained / self.num_tokens:.0%})" if self.num_tokens and self.unit == "row" else ""
        table = [(f"{self.unit}s", f"{self.num_rows:,}"), ("tokens", f"{self.num_tokens:,}")]
        if self.unit == "row":
            table.append(("trained tokens", f"{self.num_trained:,}{share}"))
            table += [("truncated", f"{self.num_truncated:,}"), ("dropped", f"{self.num_dropped:,}")]
        elif self.num_cramped:
            table.append(("cramped", f"{self.num_cramped:,} leave less than rollout.max_completion_tokens"))
        table.append(("refused", f"{len(self.refused):,}"))
        if self.lengths:
            limit = f"{max(self.lengths):,} of {self.max_seq_tokens:,} tokens, {self.longest}"
            table.append(("longest", limit))
        return table

    def histogram(self) -> list[tuple[str, int]]:
        """Rows by length: (range of tokens, count)."""
        if not self.lengths:
            return []
        width = _round_up(max(self.lengths) / NUM_BINS)
        counts = Counter((length - 1) // width for length in self.lengths)
        return [(f"{number * width + 1}-{(number + 1) * width}", counts[number]) for number in range(max(counts) + 1)]


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 and so on.

    >>> [_round_up(width) for width in (0.2, 3, 17.5, 51)]
    [1, 5, 20, 100]
    """
    power = int(10 ** max(0, math.floor(math.log10(width))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)


def survey_rows(
    recipe: Recipe,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_shown: int = 0,
    limit: int | None = None,
) -> Survey:
    """Read and tokenize every row, and go on where training would stop.

    Raises:
        DataError: there are no rows at all.
        ModelError: the chat template cannot be used.
    """
    unreadable: list[DataError] = []
    rows = read_rows(source, recipe.data, limit, unreadable)
    counts = _Counts(recipe, tokenizer, num_shown)
    counts.refused += [str(error) for error in unreadable]
    for start in range(0, len(rows), ENCODE_ROWS):
        chunk = rows[start : start + ENCODE_ROWS]
        (counts.add_prompts if recipe.method == "rft" else counts.add_rows)(chunk)
    file = rows[0].file if rows else str(source.path or source.hub)
    return counts.survey(file, len(rows) + len(unreadable))


@final
class _Counts:
    """A survey in the making."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, num_shown: int) -> None:
        self.recipe, self.data, self.tokenizer, self.num_shown = recipe, recipe.data, tokenizer, num_shown
        self.encoder = ChatEncoder(tokenizer, recipe.model, self.data)
        anything = self.data.model_copy(update={"max_seq_tokens": NO_LIMIT})
        self.limitless = ChatEncoder(tokenizer, recipe.model, anything)
        self.refused: list[str] = []
        self.lengths: list[int] = []
        self.shown: list[ShownRow] = []
        self.num_tokens = self.num_trained = self.num_truncated = self.num_dropped = self.num_cramped = 0
        self.longest = ""

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Count sft rows."""
        by_place = {str(row): row for row in rows}
        for sequence in self._encoded(rows):
            self._note_length(len(sequence.token_ids), sequence.where)
            note = ""
            if len(sequence.token_ids) > self.data.max_seq_tokens:
                kept, note = self._overlong(by_place[sequence.where])
                if kept is None:
                    continue
                sequence = kept
            self.num_tokens += len(sequence.token_ids)
            self.num_trained += sequence.num_trained
            self._show(sequence, note)

    def add_prompts(self, rows: Sequence[Row]) -> None:
        """Count rft prompts."""
        assert self.recipe.rollout is not None, "plans have rollout settings"
        for row in rows:
            try:
                ids = self.encoder.encode_prompt(row)
            except DataError as error:
                self.refused.append(str(error))
                continue
            self._note_length(len(ids), str(row))
            self.num_tokens += len(ids)
            room = self.data.max_seq_tokens - len(ids)
            self.num_cramped += room < self.recipe.rollout.max_completion_tokens
            self._show(TokenSequence(ids, (False,) * len(ids), where=str(row)), f", room for {room:,} more")

    def survey(self, file: str, num_rows: int) -> Survey:
        """What was counted."""
        return Survey(
            file=file,
            unit="prompt" if self.recipe.method == "rft" else "row",
            num_rows=num_rows,
            num_tokens=self.num_tokens,
            num_trained=self.num_trained,
            num_truncated=self.num_truncated,
            num_dropped=self.num_dropped,
            num_cramped=self.num_cramped,
            refused=tuple(self.refused),
            lengths=tuple(self.lengths),
            longest=self.longest,
            max_seq_tokens=self.data.max_seq_tokens,
            shown=tuple(self.shown),
        )

    def _encoded(self, rows: Sequence[Row]) -> Iterator[TokenSequence]:
        """All at once, which is quick; one by one where a row is refused."""
        try:
            yield from self.limitless.encode(rows).sequences
            return
        except DataError:
            pass
        for row in rows:
            try:
                sequences = self.limitless.encode([row]).sequences
            except DataError as error:
                self.refused.append(str(error))
                continue
            yield from sequences

    def _overlong(self, row: Row) -> tuple[TokenSequence | None, str]:
        """What training makes of a row that is too long."""
        try:
            sequence = self.encoder.encode([row]).sequences[0]
        except DataError as error:
            if self.data.overlong == "error":
                self.refused.append(str(error))
            else:
                self.num_dropped += 1
            return None, ""
        self.num_truncated += 1
        return sequence, ", truncated"

    def _note_length(self, length: int, where: str) -> None:
        if length > max(self.lengths, default=0):
            self.longest = where
        self.lengths.append(length)

    def _show(self, sequence: TokenSequence, note: str) -> None:
        if len(self.shown) == self.num_shown:
            return
        kept = sequence.truncated(SHOWN_TOKENS)
        cut = f", the first {SHOWN_TOKENS:,} shown" if len(kept.token_ids) < len(sequence.token_ids) else ""
        pieces = tuple(
            Piece(text, is_trained)
            for text, is_trained in zip(token_texts(self.tokenizer, kept.token_ids), kept.trained, strict=True)
        )
        num_tokens = len(sequence.token_ids)
        self.shown.append(ShownRow(sequence.where, num_tokens, sequence.num_trained, note + cut, pieces))


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds: "" while a character is unfinished, and nothing that a terminal obeys."""
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(token_ids) + 1):
        before = tokenizer.decode(token_ids[start:read], clean_up_tokenization_spaces=False)
        after = tokenizer.decode(token_ids[start:end], clean_up_tokenization_spaces=False)
        if after.endswith(HALF_CHARACTER) and end < len(token_ids):
            texts.append("")
            continue
        texts.append("".join(_visible(character) for character in after[len(before) :]))
        start, read = read, end
    return texts


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode("ascii")


def overlap(recipe: Recipe) -> int:
    """Held-out rows that are training rows too."""
    if recipe.data.eval is None:
        return 0
    trained = {_fields_text(row) for row in read_rows(recipe.data.train, recipe.data, refused=[])}
    held_out = read_rows(recipe.data.eval, recipe.data, recipe.data.eval_rows, refused=[])
    return sum(_fields_text(row) in trained for row in held_out)


def _fields_text(row: Row) -> str:
    return json.dumps(dict(row), sort_keys=True, default=str)
