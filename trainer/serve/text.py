"""Text of a sequence as its tokens come, cut before stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import final

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


@final
class TextStream:
    """Decodes token by token; text that may be the beginning of a stop string is held back."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: a fast one.
            stop: strings that end the text; they are not part of it.
            skip_special_tokens: leave out stop tokens and the like.
            shown_ids: special tokens that are shown all the same.
        """
        self._shown = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in shown_ids}
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = [each for each in stop if each]
        self._held = ""
        self.stopped_by: str | None = None
        """Stop string that ended the text."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self.stopped_by is not None

    def feed(self, token: int) -> str:
        """Text that is certain now."""
        self._held += (self._decoder.step(self._backend, token) or "") + self._shown.get(token, "")
        for stop in self._stop:
            at = self._held.find(stop)
            if at >= 0:
                self.stopped_by = stop
                self._held = self._held[:at]
        if self.is_stopped:
            return ""
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready

    def flush(self) -> str:
        """What was held back, once no token follows."""
        rest, self._held = self._held, ""
        return rest


def special_ids(tokenizer: PreTrainedTokenizerBase, texts: Collection[str]) -> frozenset[int]:
    """Special tokens with one of these texts."""
    added = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in added.items() if token.special and token.content in texts)


def overlap(text: str, stop: str) -> int:
    r"""Characters at the end of a text with which a stop string begins.

    >>> overlap("a\n#", "\n##"), overlap("a", "b")
    (2, 0)
    """
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
