"""Speculative decoding with a smaller model: it proposes what it would draw itself (arXiv:2211.17192).

It draws with the noise of the positions, as the large model will, so that both mostly agree where their distributions
are close. What the large model draws decides: the tokens are those of decoding without proposals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

import torch

from trainer.engine.attention import Segment
from trainer.engine.draw import draw
from trainer.engine.model import EngineModel, StepRow
from trainer.engine.pages import PAGE, PagePool
from trainer.engine.sequences import LiveSequence
from trainer.errors import ModelError

MOST: Final = 8
"""Tokens of the longest proposal: each costs a step of the small model."""
CHUNK: Final = 256
"""Tokens of a prompt that the small model reads before one step of the large one."""


@final
@dataclass
class _Read:
    """What the small model has read of a sequence."""

    shadow: LiveSequence
    """The sequence with the tokens that are proposed at present."""
    stored: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in the pages."""

    def rewind(self, ids: Sequence[int]) -> int:
        """Keep what is still true; returns how many tokens that are, at least one fewer than there are."""
        same = 0
        for ours, theirs in zip(self.stored, ids[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        del self.stored[same:]
        return same


@final
class Drafter:
    """The small model, and its keys and values."""

    def __init__(self, model: EngineModel, num_pages: int, vocab_size: int) -> None:
        """Prepare.

        Args:
            model: the small model.
            num_pages: of its own store.
            vocab_size: of the large model, whose tokenizer is the same; see `check_vocabularies`.
        """
        self._model, self._vocab = model, min(vocab_size, model.vocab_size)
        self.pool: PagePool = model.pool(num_pages)
        self._known: dict[LiveSequence, _Read] = {}

    def propose(self, sequences: Sequence[LiveSequence]) -> dict[LiveSequence, list[int]]:
        """Tokens that may come next; none of a sequence whose proposals were wrong lately, or that follows a grammar.

        Args:
            sequences: of which at least one token was drawn.
        """
        lengths: dict[LiveSequence, int] = {}
        rows: list[tuple[_Read, StepRow]] = []
        for sequence in sequences:
            if sequence.matcher is not None or sequence.num_left < 2 or sequence.draft_pace.rests():
                continue
            count = min(MOST, sequence.draft_pace.size, sequence.num_left - 1)
            row = self._begin(sequence, count)
            if row is not None:
                rows.append((self._known[sequence], row))
                lengths[sequence] = count if row.wanted else 0
        if not rows:
            return {}
        logits = self._step(rows)
        going = [(sequence, self._known[sequence]) for sequence, count in lengths.items() if count]
        while going:
            drawn = draw(logits[:, : self._vocab], self._model.form, [read.shadow for _, read in going])
            for (_, read), token in zip(going, drawn, strict=True):
                read.shadow.add(token.token)
            going = [
                (sequence, read)
                for sequence, read in going
                if len(read.shadow.drawn) - len(sequence.drawn) < lengths[sequence]
                and read.shadow.drawn[-1] not in sequence.sampling.stop_ids
            ]
            if going:
                logits = self._step([(read, _one(read)) for _, read in going])
        return {
            sequence: self._known[sequence].shadow.drawn[len(sequence.drawn) :]
            for sequence, count in lengths.items()
            if count
        }

    def forget(self, sequence: LiveSequence) -> None:
        """Free what was read of a sequence that has ended, or waits again."""
        read = self._known.pop(sequence, None)
        if read is not None:
            self.pool.release(read.shadow.pages)

    def _begin(self, sequence: LiveSequence, count: int) -> StepRow | None:
        """The tokens that are not read yet, a chunk of them; None where there is no room."""
        ids = [*sequence.prompt, *sequence.drawn]
        if len(ids) + count > self._model.window:
            return None
        read = self._known.get(sequence)
        if read is None:
            sampling = replace(sequence.sampling, logprobs=None, grammar=None, prompt_logprobs=None)
            read = self._known[sequence] = _Read(LiveSequence(sequence.id, sequence.prompt, sampling, None))
        shadow, first = read.shadow, read.rewind(ids)
        for _ in range(shadow.pages_for(len(ids) + count)):
            page = self.pool.take()
            if page is None:
                return None
            shadow.pages.append(page)
        shadow.drawn, shadow.counts = list(sequence.drawn), Counter(sequence.counts)
        own = ids[first : first + CHUNK]
        is_whole = first + len(own) == len(ids)
        return StepRow(own, Segment(shadow.pages, first, len(own)), None, [len(own) - 1] if is_whole else [])

    def _step(self, rows: Sequence[tuple[_Read, StepRow]]) -> torch.Tensor:
        """[W, V] outputs behind the rows that want them."""
        logits = self._model.step(self.pool, [row for _, row in rows])
        for read, row in rows:
            read.stored += row.token_ids
        return logits


def _one(read: _Read) -> StepRow:
    """The token that was proposed last."""
    return StepRow([read.shadow.drawn[-1]], Segment(read.shadow.pages, len(read.stored), 1), None, [0])


def num_draft_pages(model: EngineModel, sequences: int, most: int) -> int:
    """Pages with room for this many sequences at the model's window, and at most those of the large model."""
    return min(most, sequences * -(-(model.window + MOST) // PAGE))


def check_vocabularies(small: dict[str, int], large: dict[str, int], path: str) -> None:
    """Refuse a draft model whose tokens mean something else.

    Args:
        small: id by token of the draft model's tokenizer.
        large: of the large model's.
        path: of the draft model, for the message.

    Raises:
        ModelError: they differ.
    """
    if small != large:
        different = sum(large.get(token) != number for token, number in small.items())
        raise ModelError(
            f"--draft-model {path}: its tokenizer is another one ({different:,} of {len(small):,} tokens differ); a "
            "draft model has the tokens of the model that it drafts for"
        )
