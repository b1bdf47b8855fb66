"""The text of an answer piece by piece, as its tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

from transformers import PreTrainedTokenizerBase

from trainer.sampling.sampler import decoded

INCOMPLETE: Final = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


@final
class TextStream:
    """Passes on what each token adds to the text; the pieces together are the text of the completion."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        """Begin an answer.

        Args:
            tokenizer: of the model.
            write: takes a piece of text.
        """
        self._tokenizer, self._write = tokenizer, write
        self._shown = ""

    def take(self, index: int, token_ids: Sequence[int]) -> None:
        """Take the tokens so far; waits while they end inside a character, or change what was shown.

        Args:
            index: of the completion; only the first one is shown.
            token_ids: all of its tokens so far.
        """
        if index == 0:
            text = decoded(self._tokenizer, token_ids)
            if not text.endswith(INCOMPLETE) and text.startswith(self._shown):
                self._pass_on(text)

    def finish(self, text: str) -> None:
        """Pass on the rest.

        Args:
            text: of the whole completion.
        """
        if text.startswith(self._shown):
            self._pass_on(text)
        else:  # the tokenizer changed earlier text: the whole answer on a line of its own
            self._write(f"\n{text}")
            self._shown = text

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text
