"""The prompt of the next turn of a conversation, as token ids: sampled ids are never tokenized again.

The next prompt is the previous ids, followed by what the chat template renders behind the end of the turn. That is
right only where the template keeps what was said. Where it rewrites earlier turns, as templates of reasoning models do
(they drop the reasoning), the whole conversation is rendered again, and a new sequence of the same rollout begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from trainer.data.template import ChatTemplate, Messages
from trainer.errors import DataError


@final
@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as it was rendered and as ids."""

    text: str
    token_ids: tuple[int, ...]


@final
@dataclass(frozen=True)
class PromptWriter:
    """Renders conversations with tools through the model's chat template."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    stop_ids: frozenset[int]
    arguments: Mapping[str, Any]
    """Further variables of the template."""
    same_turn: Callable[[str, str], bool]
    """Whether a template kept what the policy wrote."""

    def first(self, messages: Messages, tools: Sequence[Mapping[str, Any]], where: str) -> TokenizedPrompt:
        """The prompt of a conversation, all of it tokenized.

        Args:
            messages: up to the turn that is asked for.
            tools: their schemas.
            where: file and line of the row, for messages.

        Raises:
            DataError: the template refuses the messages.
        """
        try:
            text = self.template.prompt(messages, [dict(tool) for tool in tools] or None, self.arguments)
        except Exception as error:  # a template raises whatever its author thought of
            raise DataError(f"{where}: the chat template refuses the conversation: {error}") from None
        return TokenizedPrompt(text, tuple(self._ids(text)))

    def raw_text(self, token_ids: Sequence[int]) -> str:
        """A turn with its special tokens, without the stop token."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def tail(self, before: str, drawn: Sequence[int], after: str) -> tuple[int, ...] | None:
        """Ids that follow the drawn ones in the next prompt; None if that prompt must begin a new sequence.

        Args:
            before: text of the prompt that the turn answers.
            drawn: ids of the turn.
            after: text of the next prompt.
        """
        if not drawn or not after.startswith(before):
            return None
        rest = after[len(before) :]
        has_stop = drawn[-1] in self.stop_ids
        stops = [drawn[-1]] if has_stop else sorted(self.stop_ids)
        texts = [text for text in map(self._token, stops) if text in rest]
        if not texts:
            return None
        end = min(texts, key=rest.find)
        turn, _, behind = rest.partition(end)
        if not self.same_turn(self.raw_text(drawn), turn):
            return None
        ids = self._ids(end + behind)
        if not ids or self._token(ids[0]) != end:
            return None
        return tuple(ids[1:] if has_stop else ids)

    def _token(self, token: int) -> str:
        text = self.tokenizer.convert_ids_to_tokens(token)
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
