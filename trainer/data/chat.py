"""From rows to tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.config.recipe import DataSettings, ModelSettings
from trainer.data.control_tokens import ControlTokens
from trainer.data.fields import UNREAD, use_of_fields, use_of_prompt_fields
from trainer.data.fitness import refuse_unfit
from trainer.data.forms import Conversation, read_conversation, read_plain_text, row_weight, without_ignored
from trainer.data.joining import Joiner, TokenizedTurn
from trainer.data.lost_text import LostText
from trainer.data.stop_tokens import embedding_rows, stop_token_ids
from trainer.data.template import ChatTemplate, apply_override, opened_thinking
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.data.turns import TrainedTurn, render, trained_indices, trained_turn
from trainer.errors import DataError, ModelError
from trainer.types import Row

ENCODE_ROWS = 256
"""Rows tokenized by one call."""
PREFILLED_TOKENS: Final = 16
"""Last tokens of a prompt among which a pre-filled `<think>` lies; in small vocabularies it has seven."""


@final
@dataclass(frozen=True)
class EncodedRows:
    """Rows as tokens, and what happened to those that were too long.

    A chat of three trained turns is one sequence where the template only appends to earlier turns, and three sequences
    where it rewrites them (Qwen3 drops earlier reasoning): each turn stands behind the tokens the model will be given.
    """

    rows: tuple[tuple[TokenSequence, ...], ...]
    """The sequences of each row that is trained."""
    num_rows: int
    """Rows read, dropped ones included."""
    num_truncated: int
    num_dropped: int
    num_split: int
    """Rows of more than one sequence."""
    num_respaced: int
    """Rows with trained text of which the template removes or changes white space."""

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The sequences of all rows."""
        return tuple(sequence for row in self.rows for sequence in row)


@final
@dataclass(frozen=True)
class PreparedRow:
    """A row as text, before it is tokenized with others."""

    row: Row
    turns: tuple[TrainedTurn, ...]
    weight: float
    form: str
    """How the row was recognised, such as `prompt and completion`."""
    uses: dict[str, str]
    """What each field became."""
    is_respaced: bool = False
    """Whether the template removes or changes white space of trained text."""


@final
class ChatEncoder:
    """Renders rows through the model's chat template and marks what is trained."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        data: DataSettings,
        *,
        for_prompts: bool = False,
    ) -> None:
        """Take the template and check it.

        Args:
            tokenizer: has the chat template; `model.chat_template` replaces it.
            model: names the template and the directory with the stop tokens.
            data: how rows become tokens.
            for_prompts: whether only rft prompts are encoded, of which no token is trained.

        Raises:
            ModelError: no usable template, or training would end turns with a token that does not stop generation.
        """
        if not tokenizer.is_fast:
            raise ModelError("needs a fast tokenizer (tokenizer.json), which reads and writes any text unchanged")
        self.tokenizer = tokenizer
        self.data = data
        apply_override(tokenizer, model.chat_template)
        self.template = ChatTemplate(tokenizer, data.template_date) if data.format == "chat" else None
        self.stop_ids = stop_token_ids(tokenizer, model.path)
        texts = tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
        stop_texts = frozenset(text for text in texts if text is not None)  # None: not in this tokenizer
        self._stop_texts = stop_texts
        self.num_embeddings = embedding_rows(model.path)
        self._joiner = Joiner(tokenizer, self.stop_ids, self.num_embeddings)
        self._control = None if data.allow_special_tokens else ControlTokens(tokenizer, stop_texts)
        self._lost = LostText(self.template) if self.template is not None else None
        if self.template is not None and not for_prompts:
            refuse_unfit(self.template, self._joiner, stop_texts, data.chat_template_kwargs)

    def encode(self, rows: Iterable[Row]) -> EncodedRows:
        """Tokenize sft rows.

        Raises:
            DataError: a row cannot be trained on; names file and line.
        """
        encoded: list[tuple[TokenSequence, ...]] = []
        truncated = dropped = total = split = respaced = 0
        pending: list[PreparedRow] = []

        def flush() -> None:
            nonlocal truncated, dropped, split
            for sequences in self.tokenize(pending):
                kept, was_truncated = self.within_limit(sequences)
                if not kept:
                    dropped += 1
                    continue
                truncated += was_truncated
                split += len(kept) > 1
                encoded.append(kept)
            pending.clear()

        for row in rows:
            total += 1
            pending.append(self.prepare(row))
            respaced += pending[-1].is_respaced
            if len(pending) == ENCODE_ROWS:
                flush()
        if pending:
            flush()
        if not encoded:
            raise DataError(f"none of {total} rows is within data.max_seq_tokens ({self.data.max_seq_tokens:,})")
        return EncodedRows(tuple(encoded), total, truncated, dropped, split, respaced)

    def encode_prompt(self, row: Row, room: int = 1) -> tuple[int, ...]:
        """Tokenize an rft prompt, up to where the model goes on.

        Args:
            row: the prompt.
            room: tokens of `data.max_seq_tokens` that the completion may need.

        Raises:
            DataError: the row is no prompt, or leaves no room for a completion.
        """
        ids = self._prompt_ids(row)
        if len(ids) + room > self.data.max_seq_tokens:
            limit = self.data.max_seq_tokens
            rest = f" and the completion may have {room:,}" if room > 1 else ""
            raise DataError(
                f"{row}: the prompt has {len(ids):,} tokens{rest}; data.max_seq_tokens is {limit:,}. "
                "Raise it, shorten the row, lower rollout.max_completion_tokens, or set data.overlong to drop."
            )
        return ids

    def kept_prompt(self, row: Row, room: int) -> tuple[int, ...] | None:
        """Tokenize an rft prompt as `encode_prompt`; None for one that is too long where data.overlong is drop."""
        if self.data.overlong != "drop":
            return self.encode_prompt(row, room)
        ids = self._prompt_ids(row)
        return ids if len(ids) + room <= self.data.max_seq_tokens else None

    def prefilled(self, prompt_ids: Sequence[int]) -> str:
        """The thinking that the prompt of a template opens for the answer, such as `<think>` (DeepSeek R1, Qwen3.5).

        Rewards see it before the completion. A block that the prompt closes too is no part of the answer.

        Args:
            prompt_ids: of a prompt, up to where the model goes on.
        """
        end = self.tokenizer.decode(list(prompt_ids[-PREFILLED_TOKENS:]), skip_special_tokens=False)
        return opened_thinking(str(end))

    def _prompt_ids(self, row: Row) -> tuple[int, ...]:
        text = self.prepare_prompt(row)[0]
        (ids,) = self._joiner.ids_of([text])
        self._joiner.refuse_bad_ids(row, ids)
        return tuple(ids)

    def prepare_prompt(self, row: Row) -> tuple[str, str, dict[str, str]]:
        """The text of an rft prompt, the form of its row, and what each field became.

        Raises:
            DataError: the row is no prompt, or something of it does not reach the text.
        """
        assert self.template is not None, "recipes with prompts have `format: chat`"
        chat = read_conversation(row, self.data, with_completion=False)
        uses = use_of_prompt_fields(row, chat, self.data)
        text = _checked_text(render(row, self.template, chat.messages, chat, is_prompt=True).text, row)
        self._refuse_lost(row, chat, text, is_prompt=True)
        return text, chat.form, uses

    def prepare(self, row: Row) -> PreparedRow:
        """Render an sft row.

        Raises:
            DataError: it cannot be trained on, or something of it would be lost.
        """
        weight = row_weight(without_ignored(row, self.data))
        if self.template is None:
            plain = read_plain_text(row, self.data)
            uses = use_of_fields(row, plain, self.data)
            turn = TrainedTurn(_checked_text(plain.prompt, row), _checked_text(plain.completion, row), (), ())
            return PreparedRow(row, (turn,), weight, plain.form, uses)
        chat = read_conversation(row, self.data, with_completion=True)
        uses = use_of_fields(row, chat, self.data)
        indices = trained_indices(row, chat, self.data)
        turns = [trained_turn(row, chat, index, self.template, self._stop_texts) for index in indices]
        last = turns[-1]
        is_whole = indices[-1] == len(chat.messages) - 1
        whole = (
            last.prompt + last.rest
            if is_whole
            else render(row, self.template, chat.messages, chat, is_prompt=False).text
        )
        _checked_text(whole, row)
        self._refuse_lost(row, chat, whole, is_prompt=False)
        if chat.template_arguments and not any(map(self.template.names, chat.template_arguments)):
            uses["chat_template_kwargs"] = UNREAD
        is_respaced = False
        for index, turn in zip(indices, turns, strict=True):
            is_respaced |= _is_respaced(row, index, chat.messages[index]["content"], turn.opening + turn.rest)
        return PreparedRow(row, tuple(turns), weight, chat.form, uses, is_respaced)

    def tokenize(self, prepared: Sequence[PreparedRow]) -> list[tuple[TokenSequence, ...]]:
        """The sequences of each row, of any length.

        Raises:
            DataError: a row's tokens cannot be what the model is given, or none of them would be trained.
        """
        turns = self._joiner.tokenize(
            [(item.row, turn) for item in prepared for turn in item.turns], is_text=self.template is None
        )
        following = iter(turns)
        return [self._sequences(item, [next(following) for _ in item.turns]) for item in prepared]

    def _sequences(self, item: PreparedRow, turns: Sequence[TokenizedTurn]) -> tuple[TokenSequence, ...]:
        """Join the turns of a row where each next prompt begins with all tokens up to the last stop token."""
        joined: list[tuple[list[int], list[bool]]] = []
        for turn in turns:
            trained = turn.trained
            if joined:
                ids, before = joined[-1]
                end = len(before) - before[::-1].index(True)
                if end <= turn.num_prompt and turn.token_ids[:end] == ids[:end]:
                    trained = before[:end] + trained[end:]
                    joined.pop()
            joined.append((turn.token_ids, trained))
        if item.weight == 0:
            raise DataError(f"{item.row}: no token would be trained (weight 0)")
        return tuple(
            TokenSequence(
                tuple(ids), tuple(trained), TokenInputs(weights=(item.weight,) * sum(trained[1:])), str(item.row)
            )
            for ids, trained in joined
        )

    def within_limit(self, sequences: tuple[TokenSequence, ...]) -> tuple[tuple[TokenSequence, ...], bool]:
        """The sequences of a row that are kept, and whether one was truncated; none where the row is dropped.

        Raises:
            DataError: one is longer than data.max_seq_tokens, and data.overlong says error.
        """
        limit = self.data.max_seq_tokens
        longest = max(sequences, key=lambda sequence: len(sequence.token_ids))
        if len(longest.token_ids) <= limit:
            return sequences, False
        if self.data.overlong == "error":
            raise DataError(
                f"{longest.source}: {len(longest.token_ids):,} tokens are more than data.max_seq_tokens "
                f"({limit:,}). Raise it, or set data.overlong to drop or truncate."
            )
        if self.data.overlong == "drop":
            return (), False
        kept = [sequence.truncated(limit) for sequence in sequences]
        return tuple(sequence for sequence in kept if sequence.num_trained), True

    def _refuse_lost(self, row: Row, chat: Conversation, text: str, *, is_prompt: bool) -> None:
        assert self._lost is not None, "chats have a template"
        if self._control is not None:
            self._control.refuse(row, chat)
        self._lost.refuse(row, chat, text, is_prompt=is_prompt)


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that is trained with.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model.path}: no tokenizer can be loaded: {reason}") from None
    apply_override(tokenizer, model.chat_template)
    return tokenizer


def _is_respaced(row: Row, index: int, content: str, rest: str) -> bool:
    """Whether the template changes white space of a trained turn; other changes are refused.

    Raises:
        DataError: the text of the turn is not what the row wrote.
    """
    if content in rest:
        return False
    if "".join(content.split()) not in "".join(rest.split()):
        raise DataError(
            f"{row}: messages[{index}]: the chat template rewrites or leaves out the content of this turn. Put "
            "reasoning into `reasoning_content`, or set another `model.chat_template`."
        )
    first = content[: len(content) - len(content.lstrip())]
    if first and content.rstrip() not in rest and content.strip() in rest:
        raise DataError(
            f"{row}: messages[{index}]: the chat template removes the {first!r} at the beginning of this turn, so it "
            "would not be trained. Remove it from the row, or set another `model.chat_template`."
        )
    return True


def _checked_text(text: str, row: Row) -> str:
    """Half of a surrogate pair is legal in JSON and is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row}: {text[error.start]!r} is half a character (a lone surrogate). Correct the text."
        ) from None
    return text
