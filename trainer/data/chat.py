"""From rows to tokens, and which of them are trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from trainer.config.recipe import DataSettings, ModelSettings
from trainer.data.jsonl import row_messages, row_weight
from trainer.data.template import Rendered, render, training_template
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.errors import DataError, ModelError
from trainer.types import Row

ENCODE_ROWS = 256
"""Rows tokenized by one call."""


@final
@dataclass(frozen=True)
class EncodedRows:
    """Rows as tokens, and what happened to those that were too long."""

    sequences: tuple[TokenSequence, ...]
    num_rows: int
    num_truncated: int
    num_dropped: int


@final
@dataclass(frozen=True)
class _Pending:
    """A row as text, before it is tokenized with others."""

    row: Row
    text: str
    spans: tuple[tuple[int, int], ...]
    weight: float


@final
class ChatEncoder:
    """Renders rows through the model's chat template and marks what is trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: ModelSettings, data: DataSettings) -> None:
        """Choose and check the template.

        Raises:
            ModelError: no usable template, or training would end turns with a token that does not stop generation.
        """
        if not tokenizer.is_fast:
            raise ModelError("needs a fast tokenizer (tokenizer.json), which knows where each token stands in the text")
        self.tokenizer = tokenizer
        self.data = data
        self.template = "" if data.format == "text" else training_template(tokenizer, model.chat_template)
        self.stop_ids = stop_token_ids(tokenizer, model.path)
        if data.format == "chat":
            self._refuse_wrong_stop()

    def encode(self, rows: Iterable[Row]) -> EncodedRows:
        """Tokenize sft rows.

        Raises:
            DataError: a row cannot be trained on; names file and line.
        """
        sequences: list[TokenSequence] = []
        truncated = dropped = total = 0
        pending: list[_Pending] = []

        def flush() -> None:
            nonlocal truncated, dropped
            for sequence in self._tokenize(pending):
                length = len(sequence.token_ids)
                if length > self.data.max_seq_tokens:
                    if self.data.overlong == "error":
                        raise DataError(
                            f"{sequence.source}: {length:,} tokens are more than data.max_seq_tokens "
                            f"({self.data.max_seq_tokens:,}). Raise it, or set data.overlong to drop or truncate."
                        )
                    if self.data.overlong == "drop":
                        dropped += 1
                        continue
                    truncated += 1
                    sequence = sequence.truncated(self.data.max_seq_tokens)
                    if not sequence.num_trained:
                        truncated, dropped = truncated - 1, dropped + 1
                        continue
                sequences.append(sequence)
            pending.clear()

        for row in rows:
            total += 1
            pending.append(self._render(row))
            if len(pending) == ENCODE_ROWS:
                flush()
        if pending:
            flush()
        if not sequences:
            raise DataError(f"none of {total} rows is within data.max_seq_tokens ({self.data.max_seq_tokens:,})")
        return EncodedRows(tuple(sequences), total, truncated, dropped)

    def encode_prompt(self, row: Row, room: int = 1) -> tuple[int, ...]:
        """Tokenize an rft prompt, up to where the model goes on.

        Args:
            row: the prompt.
            room: tokens of `data.max_seq_tokens` that the completion may need.

        Raises:
            DataError: the row is no prompt, or leaves no room for a completion.
        """
        messages = row_messages(row, self.data, with_completion=False)
        text = _checked_text(self._rendered(row, messages, add_generation_prompt=True).text, row)
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        self._refuse_double_bos(ids, str(row))
        if len(ids) + room > self.data.max_seq_tokens:
            limit = self.data.max_seq_tokens
            rest = f" and the completion may have {room:,}" if room > 1 else ""
            raise DataError(
                f"{row}: the prompt has {len(ids):,} tokens{rest}; data.max_seq_tokens is {limit:,}. "
                "Raise it, shorten the row, or lower rollout.max_completion_tokens."
            )
        return ids

    def _render(self, row: Row) -> _Pending:
        if self.data.format == "text":
            prompt, completion = row.get("prompt"), row.get("completion")
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise DataError(f"{row}: `format: text` needs the texts `prompt` and `completion`")
            if not completion.strip():
                raise DataError(f"{row}: the completion is empty. Remove the row.")
            text = prompt + completion + str(self.tokenizer.eos_token)
            return _Pending(row, _checked_text(text, row), ((len(prompt), len(text)),), row_weight(row))
        messages = row_messages(row, self.data, with_completion=True)
        rendered = self._rendered(row, messages, add_generation_prompt=False)
        spans = rendered.spans
        turns = [message for message in messages if message["role"] == "assistant"]
        if any(_is_empty(turn) for turn in turns if turn.get("weight", 1)):
            raise DataError(f"{row}: an assistant turn is empty. Remove it or the row, or give the turn `weight: 0`.")
        if len(spans) == len(turns):
            spans = tuple(span for span, turn in zip(spans, turns, strict=True) if turn.get("weight", 1))
        elif any(turn.get("weight", 1) == 0 for turn in turns):
            raise DataError(f"{row}: the chat template merges assistant turns, so `weight: 0` cannot be honoured")
        if not spans:
            raise DataError(f"{row}: no token would be trained")
        return _Pending(row, _checked_text(rendered.text, row), spans, row_weight(row))

    def _rendered(self, row: Row, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> Rendered:
        messages = [_with_parsed_arguments(message, row) for message in messages]
        tools = _checked_tools(row)
        try:
            rendered = render(
                self.template, self.tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template raises whatever its author thought of
            raise DataError(f"{row}: the chat template refuses the row: {error}") from None
        _refuse_unrendered(row, messages, tools, rendered.text)
        return rendered

    def _tokenize(self, pending: Sequence[_Pending]) -> list[TokenSequence]:
        add_bos = self.data.format == "text"
        encoded = self.tokenizer(
            [item.text for item in pending], add_special_tokens=add_bos, return_offsets_mapping=True
        )
        result = []
        for item, ids, offsets in zip(pending, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            trained = [any(_is_within(offset, span) for span in item.spans) for offset in offsets]
            self._refuse_double_bos(ids, str(item.row))
            if not any(trained[1:]) or item.weight == 0:
                raise DataError(f"{item.row}: no token would be trained (weight 0)")
            result.append(
                TokenSequence(
                    tuple(ids), tuple(trained), TokenInputs(weights=(item.weight,) * sum(trained[1:])), str(item.row)
                )
            )
        return result

    def _refuse_double_bos(self, ids: Sequence[int], where: str) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise DataError(f"{where}: begins with two {self.tokenizer.bos_token} tokens; mend the template or the row")

    def _refuse_wrong_stop(self) -> None:
        chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        row = Row({"messages": [*chat, *chat]}, file="(template check)")
        sequence = self._tokenize([self._render(row)])[0]
        ends: list[int] = []
        for token, trained, before in zip(
            sequence.token_ids, sequence.loss_mask, (False, *sequence.loss_mask), strict=False
        ):
            if trained and not before:
                ends.append(token)
            elif trained and self.tokenizer.decode([token]).strip():  # some templates train a line break after it
                ends[-1] = token
        for token in ends:
            if token not in self.stop_ids:
                raise ModelError(
                    f"training ends a turn with {self.tokenizer.decode([token])!r}, but generation stops at "
                    f"{[self.tokenizer.decode([stop]) for stop in sorted(self.stop_ids)]}. "
                    "Set eos_token_id in the model's generation_config.json, or another chat template."
                )


def _is_within(offset: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token begins within a span; tokenizers that trim spaces leave one of spaces alone empty at its end."""
    (start, end), (low, high) = offset, span
    return low <= start < high if end > start else low < end <= high


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_path: str) -> frozenset[int]:
    """Tokens at which generation stops: the tokenizer's and those of generation_config.json."""
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if (Path(model_path) / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(model_path).eos_token_id
        found |= set(ids) if isinstance(ids, list) else {ids} if ids is not None else set()
    if not found:
        raise ModelError(f"{model_path}: knows no stop token; set eos_token in tokenizer_config.json")
    return frozenset(found)


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model.path}: no tokenizer can be loaded: {reason}") from None


def _with_parsed_arguments(message: dict[str, Any], row: Row) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text; templates want the object."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    parsed = []
    for call in calls:
        try:
            function = dict(call["function"])
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
        except (KeyError, TypeError, json.JSONDecodeError):
            raise DataError(f"{row}: a tool call needs function.name and JSON arguments (got {call!r:.80})") from None
        parsed.append({**call, "function": function})
    return {**message, "tool_calls": parsed}


def _checked_tools(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{row}: `tools` must be a list (got {type(tools).__name__})")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{row}: tools[{number}] needs function.name (got {tool!r:.80})")
    return tools


def _refuse_unrendered(row: Row, messages: list[dict[str, Any]], tools: list[Any] | None, text: str) -> None:
    """Some templates drop tools and tool calls without a word."""
    names = [call["function"]["name"] for message in messages for call in message.get("tool_calls") or []]
    names += [tool["function"]["name"] for tool in tools or []]
    for name in names:
        if name not in text:
            raise DataError(f"{row}: the chat template leaves out the tool {name!r}; the model does not know tools")


def _is_empty(turn: dict[str, Any]) -> bool:
    """Whether a turn says nothing, calls no tool and carries nothing else that a template may render."""
    return not turn["content"].strip() and not turn.keys() - {"role", "content", "weight", "name"}


def _checked_text(text: str, row: Row) -> str:
    """Half of a surrogate pair is legal in JSON and is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row}: {text[error.start]!r} is half a character (a lone surrogate). Mend the text."
        ) from None
    return text
