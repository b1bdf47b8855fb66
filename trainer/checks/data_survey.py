"""What a recipe's rows are as tokens: counts over all, pieces of some."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from transformers import PreTrainedTokenizerBase

from trainer.config.recipe import DataSource, Recipe, RFTRecipe
from trainer.data.chat import ENCODE_ROWS, ChatEncoder, PreparedRow
from trainer.data.fields import FieldTable
from trainer.data.sources import read_rows
from trainer.data.tokens import TokenSequence
from trainer.errors import DataError
from trainer.types import Row

NUM_BINS: Final = 8
SHOWN_TOKENS: Final = 2000
"""Of one sequence; longer ones are cut for display."""
SHOWN_REFUSED: Final = 20
SHOWN_CHARACTERS: Final = 2000
"""Of the text of a refused row."""
HALF_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"


@final
@dataclass(frozen=True)
class Selection:
    """Which rows are shown: those of these lines or with this text, else the first ones."""

    num_first: int = 0
    lines: tuple[int, ...] = ()
    text: str | None = None

    def takes(self, row: Row, num_shown: int) -> bool:
        """Whether the row is shown, after `num_shown` others were."""
        if self.lines:
            return row.line in self.lines
        if self.text is not None:
            return num_shown < max(1, self.num_first) and self.text in json.dumps(
                dict(row), ensure_ascii=False, default=str
            )
        return num_shown < self.num_first


@final
@dataclass(frozen=True)
class Piece:
    """A token as text; one that ends within a character shows nothing, the next one shows it whole."""

    text: str
    is_trained: bool
    token_id: int = -1


@final
@dataclass(frozen=True)
class ShownRow:
    """A sequence of a row as tokens."""

    where: str
    num_tokens: int
    num_trained: int
    note: str
    pieces: tuple[Piece, ...]


@final
@dataclass(frozen=True)
class RefusedRow:
    """A row that cannot be trained on, as it stands in the file."""

    reason: str
    text: str


@final
@dataclass(frozen=True)
class Survey:
    """Counts over all rows of a source, and some rows as tokens."""

    file: str
    unit: str
    """`row` (sft) or `prompt` (rft)."""
    num_rows: int
    num_sequences: int
    """More than the trained rows where a template rewrites earlier turns: then each turn is a sequence of its own."""
    num_tokens: int
    """Of the rows that are used, as they are used."""
    num_trained: int
    num_truncated: int
    num_dropped: int
    num_respaced: int
    """Rows with trained text of which the template removes or changes white space."""
    refused: tuple[str, ...]
    """File, line and reason of each row that training would stop at."""
    refused_rows: tuple[RefusedRow, ...]
    """The first of them with their text."""
    forms: tuple[tuple[str, int], ...]
    """How rows were recognised, and how many."""
    fields: tuple[tuple[str, str], ...]
    """What became of each field: `("messages", "prompt and trained"), ("id", "unread")`."""
    weights: tuple[float, float]
    """Smallest and largest weight of a row."""
    lengths: tuple[int, ...]
    """Tokens of each sequence that is not refused for another reason than its length, before it is truncated."""
    longest: str
    """Source of the longest row."""
    max_seq_tokens: int
    shown: tuple[ShownRow, ...]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        fields = asdict(self)
        del fields["lengths"], fields["shown"], fields["refused_rows"]
        fields |= {"forms": dict(self.forms), "fields": dict(self.fields)}
        return fields | {"longest_tokens": max(self.lengths, default=0), "histogram": dict(self.histogram())}

    def table(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        share = f" ({self.num_trained / self.num_tokens:.0%})" if self.num_tokens and self.unit == "row" else ""
        table = [(f"{self.unit}s", f"{self.num_rows:,}"), ("tokens", f"{self.num_tokens:,}")]
        if self.unit == "row":
            table.append(("trained tokens", f"{self.num_trained:,}{share}"))
            table += [("truncated", f"{self.num_truncated:,}"), ("dropped", f"{self.num_dropped:,}")]
        elif self.num_dropped:
            table.append(("dropped", f"{self.num_dropped:,} leave less than rollout.max_completion_tokens"))
        table.append(("refused", f"{len(self.refused):,}"))
        num_used = self.num_rows - len(self.refused) - self.num_dropped
        if self.num_sequences > num_used:
            text = f"{self.num_sequences:,} of {num_used:,} rows: the template rewrites earlier turns"
            table.append(("sequences", text))
        if self.num_respaced:
            table.append(("white space", f"changed by the chat template in trained text of {self.num_respaced:,} rows"))
        if self.weights != (1.0, 1.0):
            low, high = self.weights
            table.append(("row weights", f"{low:g} to {high:g}: factors on the loss, from the field `weight`"))
        if self.lengths:
            limit = f"{max(self.lengths):,} of {self.max_seq_tokens:,} tokens, {self.longest}"
            table.append(("longest", limit))
        table += [("read as", form if len(self.forms) == 1 else f"{form} ({count:,})") for form, count in self.forms]
        return table

    def histogram(self) -> list[tuple[str, int]]:
        """Sequences by length: (range of tokens, count)."""
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
    selection: Selection | None = None,
    limit: int | None = None,
) -> Survey:
    """Read and tokenize every row, and go on where training would stop.

    Args:
        recipe: for the method and how rows become tokens.
        source: the rows.
        tokenizer: the model's.
        selection: which rows are shown as tokens; none when left out.
        limit: how many rows are read at most.

    Raises:
        DataError: there are no rows at all.
        ModelError: the chat template cannot be used.
    """
    unreadable: list[DataError] = []
    rows = read_rows(source, recipe.data, limit, unreadable)
    counts = _Counts(recipe, tokenizer, selection or Selection())
    counts.refused += [str(error) for error in unreadable]
    for start in range(0, len(rows), ENCODE_ROWS):
        chunk = rows[start : start + ENCODE_ROWS]
        if isinstance(recipe, RFTRecipe):
            counts.add_prompts(chunk, recipe.rollout.max_completion_tokens)
        else:
            counts.add_rows(chunk)
    file = rows[0].file if rows else str(source.path or source.hub)
    return counts.survey(file, len(rows) + len(unreadable))


@final
class _Counts:
    """A survey in the making."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, selection: Selection) -> None:
        self.recipe, self.data, self.tokenizer, self.selection = recipe, recipe.data, tokenizer, selection
        self.encoder = ChatEncoder(tokenizer, recipe.model, self.data, for_prompts=recipe.method == "rft")
        self.refused: list[str] = []
        self.refused_rows: list[RefusedRow] = []
        self.lengths: list[int] = []
        self.shown: list[ShownRow] = []
        self.num_rows_shown = 0
        self.forms: Counter[str] = Counter()
        self.fields = FieldTable()
        self.weights: set[float] = set()
        self.num_tokens = self.num_trained = self.num_truncated = self.num_dropped = 0
        self.num_sequences = self.num_respaced = 0
        self.longest, self.longest_tokens = "", 0

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Count sft rows."""
        for item, sequences in self._tokenized([item for row in rows for item in self._prepared(row)]):
            for sequence in sequences:
                self._note_length(len(sequence.token_ids), sequence.source)
            try:
                kept, is_truncated = self.encoder.within_limit(sequences)
            except DataError as error:
                self._refuse(item.row, error)
                continue
            if not kept:
                self.num_dropped += 1
                continue
            self.num_truncated += is_truncated
            self.num_respaced += item.is_respaced
            self.num_sequences += len(kept)
            self.num_tokens += sum(len(sequence.token_ids) for sequence in kept)
            self.num_trained += sum(sequence.num_trained for sequence in kept)
            self._show(item.row, kept, ", truncated" if is_truncated else "")

    def add_prompts(self, rows: Sequence[Row], max_completion_tokens: int) -> None:
        """Count rft prompts."""
        for row in rows:
            try:
                ids = self.encoder.kept_prompt(row, max_completion_tokens)
                _, form, uses = self.encoder.prepare_prompt(row)
            except DataError as error:
                self._refuse(row, error)
                continue
            if ids is None:
                self.num_dropped += 1
                continue
            self.forms[form] += 1
            self.fields.add(uses)
            self._note_length(len(ids), str(row))
            self.num_sequences += 1
            self.num_tokens += len(ids)
            sequence = TokenSequence(ids, (False,) * len(ids), source=str(row))
            self._show(row, (sequence,), f", room for {self.data.max_seq_tokens - len(ids):,} more")

    def survey(self, file: str, num_rows: int) -> Survey:
        """What was counted."""
        return Survey(
            file=file,
            unit="prompt" if self.recipe.method == "rft" else "row",
            num_rows=num_rows,
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            num_trained=self.num_trained,
            num_truncated=self.num_truncated,
            num_dropped=self.num_dropped,
            num_respaced=self.num_respaced,
            refused=tuple(self.refused),
            refused_rows=tuple(self.refused_rows),
            forms=tuple(self.forms.most_common()),
            fields=tuple(self.fields.lines()),
            weights=(min(self.weights, default=1.0), max(self.weights, default=1.0)),
            lengths=tuple(self.lengths),
            longest=self.longest,
            max_seq_tokens=self.data.max_seq_tokens,
            shown=tuple(self.shown),
        )

    def _prepared(self, row: Row) -> Iterator[PreparedRow]:
        try:
            item = self.encoder.prepare(row)
        except DataError as error:
            self._refuse(row, error)
            return
        self.forms[item.form] += 1
        self.fields.add(item.uses)
        yield item

    def _tokenized(self, items: list[PreparedRow]) -> Iterator[tuple[PreparedRow, tuple[TokenSequence, ...]]]:
        """All at once, which is quick; one by one where a row is refused."""
        try:
            pairs = list(zip(items, self.encoder.tokenize(items), strict=True))
        except DataError:
            pairs = []
            for item in items:
                try:
                    pairs += [(item, each) for each in self.encoder.tokenize([item])]
                except DataError as error:
                    self._refuse(item.row, error)
        self.weights |= {item.weight for item, _ in pairs}
        yield from pairs

    def _refuse(self, row: Row, error: DataError) -> None:
        self.refused.append(str(error))
        if len(self.refused_rows) < SHOWN_REFUSED:
            text = json.dumps(dict(row), ensure_ascii=False, indent=1, default=str)[:SHOWN_CHARACTERS]
            self.refused_rows.append(RefusedRow(str(error), text.encode(errors="replace").decode()))

    def _note_length(self, length: int, where: str) -> None:
        if length > self.longest_tokens:
            self.longest, self.longest_tokens = where, length
        self.lengths.append(length)

    def _show(self, row: Row, sequences: Sequence[TokenSequence], note: str) -> None:
        if not self.selection.takes(row, self.num_rows_shown):
            return
        self.num_rows_shown += 1
        for number, sequence in enumerate(sequences, start=1):
            part = f", sequence {number} of {len(sequences)}" if len(sequences) > 1 else ""
            self.shown.append(self._shown(sequence, part + note))

    def _shown(self, sequence: TokenSequence, note: str) -> ShownRow:
        kept = sequence.truncated(SHOWN_TOKENS)
        cut = f", the first {SHOWN_TOKENS:,} shown" if len(kept.token_ids) < len(sequence.token_ids) else ""
        texts = token_texts(self.tokenizer, kept.token_ids)
        pieces = tuple(map(Piece, texts, kept.loss_mask, kept.token_ids))
        return ShownRow(sequence.source, len(sequence.token_ids), sequence.num_trained, note + cut, pieces)


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
