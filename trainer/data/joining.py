"""Token ids of a turn behind the exact ids of its prompt, and which of them are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from transformers import PreTrainedTokenizerBase

from trainer.data.turns import TrainedTurn
from trainer.errors import DataError, ModelError
from trainer.types import Row


@final
@dataclass(frozen=True)
class TokenizedTurn:
    """A prompt and a trained turn as ids: `num_prompt` of them are the prompt's, tokenized alone."""

    token_ids: list[int]
    trained: list[bool]
    num_prompt: int


@final
class Joiner:
    """Tokenizes turns.

    Text is tokenized whole where the prompt's own ids are a prefix of the result. Where a token would reach across the
    border ("is " + "Paris" has the token " Paris"), prompt and turn are tokenized apart, because the model is given the
    prompt alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], num_embeddings: int | None
    ) -> None:
        """Take a fast tokenizer, the stop tokens, and the size of the model's embedding where it is known."""
        self._tokenizer, self._stop_ids, self._num_embeddings = tokenizer, stop_ids, num_embeddings
        splitters = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        }
        texts = sorted(splitters, key=len, reverse=True)
        self._splitters = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._splitter_ids = frozenset(splitters.values())
        eos = tokenizer.eos_token_id
        self._end = eos if eos is not None else min(stop_ids)

    def ids_of(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of each text; of texts that occur several times only once.

        Args:
            texts: any number of texts.
            add_special_tokens: put the begin token before them, where the tokenizer has that rule.
        """
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        encoded = self._tokenizer(
            unique, add_special_tokens=add_special_tokens, return_special_tokens_mask=add_special_tokens
        )
        by_text = dict(zip(unique, encoded["input_ids"], strict=True))
        if add_special_tokens:
            for text, added in zip(unique, encoded["special_tokens_mask"], strict=True):
                # A stop token that the tokenizer itself puts at the end is none of the text's.
                by_text[text] = by_text[text][: len(added) - _trailing_ones(added)]
        return [by_text[text] for text in texts]

    def tokenize(self, turns: Sequence[tuple[Row, TrainedTurn]], *, is_text: bool) -> list[TokenizedTurn]:
        """Ids and loss mask of turns.

        Args:
            turns: each with its row.
            is_text: whether they are rows of `format: text`: with a begin token, and a stop token where it is missing.

        Raises:
            DataError: a turn's ids cannot stand behind its prompt's.
        """
        wholes = self.ids_of([turn.prompt + turn.rest for _, turn in turns], add_special_tokens=is_text)
        if is_text:
            prompts = self.ids_of([turn.prompt for _, turn in turns], add_special_tokens=True)
        else:
            prompts = self._prompts([turn.prompt for _, turn in turns], wholes)
        result = []
        for (row, turn), prompt, whole in zip(turns, prompts, wholes, strict=True):
            ids = whole if whole[: len(prompt)] == prompt else self._apart(row, turn, prompt, whole)
            if is_text:
                result.append(self._text(row, ids, len(prompt)))
            else:
                result.append(self._turn(row, turn, ids, len(prompt)))
            self.refuse_bad_ids(row, result[-1].token_ids)
        return result

    def _prompts(self, prompts: Sequence[str], wholes: Sequence[Sequence[int]]) -> list[list[int]]:
        """Ids of prompts tokenized alone, given the ids of texts that begin with them.

        A special token splits the text before anything else does, so only what follows the prompt's last one is
        tokenized again; in most templates these are the same few words in every row.
        """
        found = [list(self._splitters.finditer(prompt)) if self._splitters else [] for prompt in prompts]
        tails = [prompt[marks[-1].start() :] if marks else prompt for prompt, marks in zip(prompts, found, strict=True)]
        result = []
        for marks, tail, whole in zip(found, self.ids_of(tails), wholes, strict=True):
            places = [place for place, token in enumerate(whole) if token in self._splitter_ids] if marks else []
            head = list(whole[: places[len(marks) - 1]]) if marks else []
            result.append(head + tail)
        return result

    def refuse_bad_ids(self, row: Row, ids: Sequence[int]) -> None:
        """Refuse ids that the model does not know, and a begin token that stands there twice.

        Raises:
            DataError: names row and token.
        """
        bos = self._tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            raise DataError(
                f"{row}: begins with two {self._tokenizer.bos_token} tokens; change the chat template or the row"
            )
        if self._num_embeddings is not None and ids and max(ids) >= self._num_embeddings:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"{row}: the token {token!r} (id {max(ids):,}) has no row in the model's embedding "
                f"({self._num_embeddings:,} rows). Remove the token from the tokenizer, or enlarge the model first."
            )

    def refuse_wrong_stop(self, row: Row, turn: TrainedTurn) -> None:
        """Refuse a template whose turns do not end with a stop token.

        Raises:
            ModelError: generation would not stop where the template ends a turn.
        """
        ids, num_prompt = self._ids_of_turn(row, turn)
        self.refuse_bad_ids(row, ids)
        stop = self._stop_of(turn, ids, num_prompt)
        if stop is None and self._stop_after(turn) is not None:
            return
        if stop is not None:
            if not turn.spans or self._is_marked(turn, ids, num_prompt)[stop]:
                return
            raise ModelError(
                "the chat template never trains its stop token: the model would not end. Put it inside the "
                "`{% generation %}` markers, or remove them: what is trained is found without them."
            )
        ends = [index for index in ids[num_prompt:] if self._tokenizer.decode([index]).strip()]
        last = self._tokenizer.decode(ends[-1:])
        raise ModelError(
            f"training ends a turn with {last!r}, but generation stops at "
            f"{[self._tokenizer.decode([stop]) for stop in sorted(self._stop_ids)]}. "
            "Set eos_token_id in the model's generation_config.json, or another chat template."
        )

    def _ids_of_turn(self, row: Row, turn: TrainedTurn) -> tuple[list[int], int]:
        prompt, whole = self.ids_of([turn.prompt, turn.prompt + turn.rest])
        return (whole if whole[: len(prompt)] == prompt else self._apart(row, turn, prompt, whole)), len(prompt)

    def _turn(self, row: Row, turn: TrainedTurn, ids: list[int], num_prompt: int) -> TokenizedTurn:
        """Trained up to the first stop token after the content."""
        stop = self._stop_of(turn, ids, num_prompt)
        if stop is None:
            after = self._stop_after(turn)
            if after is None:
                raise DataError(
                    f"{row}: the chat template does not end a turn of this row with a stop token "
                    f"({', '.join(self._tokenizer.convert_ids_to_tokens(sorted(self._stop_ids)))}), or has one in "
                    "the middle of it, so the model would not learn to stop where it should. Set eos_token_id in the "
                    "model's generation_config.json, or `model.chat_template`."
                )
            ids = [*ids, after]
            stop = len(ids) - 1
        trained = [num_prompt <= index <= stop for index in range(len(ids))]
        if turn.spans:
            marked = self._is_marked(turn, ids, num_prompt)
            trained = [both and own for both, own in zip(trained, marked, strict=True)]
            if not any(trained[1:]):
                raise DataError(f"{row}: no token would be trained inside the template's generation markers")
        return TokenizedTurn(ids, trained, num_prompt)

    def _stop_of(self, turn: TrainedTurn, ids: Sequence[int], num_prompt: int) -> int | None:
        """Position of the stop token that ends the turn: the first one behind everything that the row wrote."""
        stops = [index for index in range(num_prompt, len(ids)) if ids[index] in self._stop_ids]
        if len(stops) > 1:
            for stop in stops:
                decoded = self._tokenizer.decode(ids[num_prompt : stop + 1], clean_up_tokenization_spaces=False)
                said = squashed(turn.opening + decoded)
                if all(squashed(text) in said for text in turn.texts):
                    return None if self._is_early(turn, stops.index(stop)) else stop
        return stops[0] if stops else None

    def _is_early(self, turn: TrainedTurn, num_before: int) -> bool:
        """Whether generation would stop before the end of the turn, at a stop token that the row did not write."""
        stops = self._tokenizer.convert_ids_to_tokens(sorted(self._stop_ids))
        return num_before > sum(text.count(stop) for text in turn.texts for stop in stops)

    def _stop_after(self, turn: TrainedTurn) -> int | None:
        """The stop token that the template puts before the next turn instead of after this one."""
        following = self.ids_of([turn.following])[0] if turn.following else []
        return following[0] if following and following[0] in self._stop_ids else None

    def _text(self, row: Row, ids: list[int], num_prompt: int) -> TokenizedTurn:
        """A completion that ends with one stop token, whether the row wrote it or not."""
        end = len(ids)
        stops = [index for index in range(num_prompt, len(ids)) if ids[index] in self._stop_ids]
        if stops and not self._tokenizer.decode(ids[stops[-1] + 1 :]).strip():
            end = stops[-1] + 1
            while end - 2 >= num_prompt and ids[end - 2] in self._stop_ids:
                end -= 1
            ids = ids[:end]
        else:
            ids = [*ids, self._end]
        first = max(1, num_prompt)
        trained = [index >= first for index in range(len(ids))]
        if sum(trained) < 2 and ids[-1] in self._stop_ids:
            raise DataError(f"{row}: no token but the stop token would be trained")
        return TokenizedTurn(ids, trained, num_prompt)

    def _apart(self, row: Row, turn: TrainedTurn, prompt: list[int], whole: list[int]) -> list[int]:
        """The ids of the prompt, and those of the rest as text that goes on."""
        anchor = self._tokenizer.convert_ids_to_tokens(self._end)
        (anchored,) = self.ids_of([anchor + turn.rest])
        ids = prompt + anchored[1:]
        decoded = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if anchored[:1] != [self._end] or decoded != self._tokenizer.decode(whole, clean_up_tokenization_spaces=False):
            raise DataError(
                f"{row}: the answer {turn.rest[:20]!r} cannot be tokenized apart from its prompt, whose last token it "
                "would change. Move the white space between prompt and answer."
            )
        return ids

    def _is_marked(self, turn: TrainedTurn, ids: Sequence[int], num_prompt: int) -> list[bool]:
        """Which tokens begin inside the markers."""
        encoded = self._tokenizer(turn.prompt + turn.rest, add_special_tokens=False, return_offsets_mapping=True)
        own, offsets, base = encoded["input_ids"], encoded["offset_mapping"], len(turn.prompt)
        if list(ids[: len(own)]) != own:
            anchor = self._tokenizer.convert_ids_to_tokens(self._end)
            encoded = self._tokenizer(anchor + turn.rest, add_special_tokens=False, return_offsets_mapping=True)
            offsets, base = [(0, 0)] * num_prompt + encoded["offset_mapping"][1:], len(anchor)
        spans = [(low + base, high + base) for low, high in turn.spans]
        marked = [any(_is_within(offset, span) for span in spans) for offset in offsets]
        marked[:num_prompt] = [False] * num_prompt
        return marked + [True] * (len(ids) - len(marked))


def squashed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def _is_within(offset: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token begins within a span; tokenizers that trim spaces leave one of spaces alone empty at its end."""
    (start, end), (low, high) = offset, span
    return low <= start < high if end > start else low < end <= high


def _trailing_ones(mask: Sequence[int]) -> int:
    return next((count for count, flag in enumerate(reversed(mask)) if not flag), len(mask))
