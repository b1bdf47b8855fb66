"""Grammars that completions follow, by llguidance."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from trainer.errors import ModelError, UserError


@final
class Grammars:
    """Compiles grammars for one tokenizer; the tokenizer is prepared at the first use."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: list[int]) -> None:
        """Remember the tokenizer.

        Args:
            tokenizer: a fast one.
            vocab_size: rows of the LM head.
            stop_ids: tokens that may follow a complete text.
        """
        self._source = (tokenizer, max(vocab_size, len(tokenizer)), stop_ids)
        self._tokenizer: Any = None

    def matcher(self, grammar: str) -> Any:
        """A matcher at the beginning of a text.

        Raises:
            UserError: the grammar cannot be followed, or llguidance is not installed.
        """
        if find_spec("llguidance") is None:
            raise ModelError("structured output needs llguidance: pip install 'tunesmith[serve]'")
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        if self._tokenizer is None:
            tokenizer, vocab, stop_ids = self._source
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab, eos_token=stop_ids)
        matcher = LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise UserError(f"grammar: {matcher.get_error()}")
        return matcher
