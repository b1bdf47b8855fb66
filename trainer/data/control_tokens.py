"""Refuses text that would become control tokens, and rows that were rendered before."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final, final

from transformers import PreTrainedTokenizerBase

from trainer.data.forms import Conversation
from trainer.data.turns import written
from trainer.errors import DataError
from trainer.types import Row

IN_ANSWERS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tokens that are part of what a model writes; some tokenizers call them special."""
HEADERS: Final = re.compile(
    r"<\|im_start\|>|\[/?INST\]|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|(?:user|assistant|system)\|>"
    r"|<｜(?:User|Assistant)｜>|<\|START_OF_TURN_TOKEN\|>"  # noqa: RUF001
)
"""How turns begin in the chat templates of common models."""


@final
class ControlTokens:
    """The control tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_texts: frozenset[str]) -> None:
        """List them: the special tokens and the stop tokens."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts = sorted((special | stop_texts) - set(IN_ANSWERS) - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def refuse(self, row: Row, chat: Conversation) -> None:
        """Refuse a row with a control token in its text.

        Raises:
            DataError: names the row, the message, the token and the remedy.
        """
        for source, text in _texts(chat):
            self._refuse_rendered(row, source, text)
            found = self._pattern.search(text) if self._pattern is not None else None
            if found is not None:
                raise DataError(
                    f"{row}: {source}: the text has the control token {found[0]!r}, which the model would read as one. "
                    "Remove it from the text, or set data.allow_special_tokens."
                )

    def _refuse_rendered(self, row: Row, source: str, text: str) -> None:
        headers = HEADERS.findall(text)
        begins = HEADERS.match(text.lstrip()) or (
            self._pattern is not None and self._pattern.match(text.lstrip()) is not None and headers
        )
        if begins and len(headers) > 1:
            raise DataError(
                f"{row}: {source}: the text was rendered by a chat template before (it begins with {text[:30]!r}), and "
                "would be rendered twice. Set `data.format: text` to train it as it is."
            )


def _texts(chat: Conversation) -> Iterator[tuple[str, str]]:
    """Place and text of everything that the row wrote."""
    for index, message in enumerate(chat.messages):
        yield f"messages[{index}]", written(message)
    if chat.tools:
        yield "tools", json.dumps(chat.tools, ensure_ascii=False)
