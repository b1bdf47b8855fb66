"""Continuous batching: which sequences take part in the next step, and what becomes of their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Final, final

import torch

from trainer.engine.attention import Segment
from trainer.engine.draft import Drafter
from trainer.engine.draw import Drawn, Report, draw, reported, scaled
from trainer.engine.model import EngineModel, StepRow
from trainer.engine.own_model import OwnModel
from trainer.engine.pages import PAGE, PagePool, prefix_keys
from trainer.engine.protocol import EndReason
from trainer.engine.sequences import LiveSequence

MAX_ROWS: Final = 64
"""Sequences that are continued in one step."""
SPECULATION_ROWS: Final = 4
"""Sequences up to which tokens are proposed: in a fuller step a further row costs as much as it may save."""
CHUNK_TOKENS: Final = 256
"""Tokens of prompts that are read in one step; more would delay the next tokens of running sequences."""


@final
@dataclass
class StepResult:
    """What a step produced."""

    tokens: list[tuple[LiveSequence, int, Report]] = field(default_factory=list)
    ended: list[tuple[LiveSequence, EndReason, str | None]] = field(default_factory=list)
    """Sequence, reason and, for errors, a message."""


@final
@dataclass
class Counters:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    preempted: int = 0


@final
class Scheduler:
    """Admits between steps, reads prompts in chunks, continues all running sequences by one token a step."""

    def __init__(
        self,
        model: EngineModel | OwnModel,
        pool: PagePool,
        *,
        max_rows: int = MAX_ROWS,
        chunk_tokens: int = CHUNK_TOKENS,
        speculates: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        """Begin without sequences.

        Args:
            model: computes steps.
            pool: the budget of keys and values.
            max_rows: sequences that run together.
            chunk_tokens: tokens of prompts in a step.
            speculates: whether tokens are proposed where few sequences run: by prompt look-up, then by the drafter.
            drafter: a smaller model; None proposes by prompt look-up alone.
        """
        self._speculates, self._drafter = speculates and model.is_paged, drafter
        self._model, self.pool = model, pool
        self._max_rows, self._chunk_tokens = max_rows, chunk_tokens
        self.waiting: deque[LiveSequence] = deque()
        self.running: list[LiveSequence] = []
        self.counters = Counters()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, sequence: LiveSequence) -> None:
        """Queue a sequence that `problem` accepts."""
        sequence.page_keys = list(prefix_keys(sequence.owner, sequence.prompt)) if self._model.is_paged else []
        self.waiting.append(sequence)

    def problem(self, prompt: Sequence[int], max_tokens: int) -> str | None:
        """Why a sequence can never run; None if it can."""
        room = min(self._model.window, self.pool.num_pages * PAGE)
        if not prompt:
            return "the prompt is empty"
        if len(prompt) + max_tokens > room:
            return f"{len(prompt):,} tokens of prompt and {max_tokens:,} to draw are more than the {room:,} that fit"
        if max(prompt) >= self._model.vocab_size or min(prompt) < 0:
            return f"a token id of the prompt is outside the vocabulary of {self._model.vocab_size:,}"
        return None

    def cancel(self, sequence: LiveSequence) -> bool:
        """Remove a sequence and free its pages; False where it has ended."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return True
        if sequence in self.running:
            self._leave(sequence)
            return True
        return False

    def step(self) -> StepResult:
        """Run one step."""
        result = StepResult()
        self._admit()
        rows = self._rows()
        if not rows:
            return result
        logits = self._model.step(self.pool, [row for _, row in rows])
        self.counters.steps += 1
        parts = iter(logits.split([len(row.wanted) for _, row in rows]))
        ready: list[tuple[LiveSequence, torch.Tensor]] = []
        for sequence, row in rows:
            part = next(parts)
            self._stored(sequence, row.segment.count - len(sequence.proposed))
            if sequence.sampling.prompt_logprobs is not None and not sequence.drawn:
                self._report_prompt(sequence, row, part)
            if sequence.num_missing == 0:
                ready.append((sequence, part[-1 - len(sequence.proposed) :]))
        self._draw(ready, result)
        return result

    def _draw(self, ready: list[tuple[LiveSequence, torch.Tensor]], result: StepResult) -> None:
        """Draw the next token of each sequence, and further ones while they are those proposed.

        Args:
            ready: sequences and [1 + proposed, V] outputs of the head.
            result: is added to.
        """
        num_drawn = 0
        while ready:
            chosen = torch.cat([part[num_drawn : num_drawn + 1] for _, part in ready])
            drawn = draw(chosen, self._model.form, [sequence for sequence, _ in ready])
            going_on: list[tuple[LiveSequence, torch.Tensor]] = []
            for (sequence, part), token in zip(ready, drawn, strict=True):
                proposed = sequence.proposed
                is_live = self._take(sequence, token, result)
                is_equal = num_drawn < len(proposed) and token.token == proposed[num_drawn]
                if is_live and is_equal:
                    sequence.num_stored += 1
                    going_on.append((sequence, part))
                elif proposed:
                    accepted = num_drawn + is_equal
                    sequence.pace.learn(len(proposed), accepted)
                    self.counters.accepted_tokens += accepted
                    sequence.proposed = []
            ready, num_drawn = going_on, num_drawn + 1

    def _admit(self) -> None:
        reading = {key for each in self.running if not each.drawn for key in each.page_keys[each.num_stored // PAGE :]}
        deferred: list[LiveSequence] = []
        while self.waiting and len(self.running) < self._max_rows:
            sequence = self.waiting.popleft()
            if self._waits_for(sequence, reading):
                deferred.append(sequence)
                continue
            if not self._enter(sequence):
                self.waiting.appendleft(sequence)
                break
            reading.update(sequence.page_keys[sequence.num_stored // PAGE :])
        self.waiting.extendleft(reversed(deferred))

    def _waits_for(self, sequence: LiveSequence, reading: set[bytes]) -> bool:
        """Whether another sequence is reading the prefix that this one lacks."""
        if sequence.drawn or sequence.sampling.prompt_logprobs is not None:
            return False
        missing = next((key for key in sequence.page_keys if not self.pool.has(key)), None)
        return missing in reading

    def _enter(self, sequence: LiveSequence) -> bool:
        """Give a sequence the pages of its prefix and of its prompt; False where they are not free."""
        shared = [] if sequence.sampling.prompt_logprobs is not None else self._shared(sequence)
        needed = -(-(sequence.length + 1) // PAGE) - len(shared)
        if needed > self.pool.num_available:
            self.pool.release(shared)
            return False
        sequence.pages = shared
        sequence.num_stored = len(shared) * PAGE
        if not sequence.drawn:
            sequence.num_cached = sequence.num_stored
            self.counters.cached_tokens += sequence.num_cached
            self.counters.prompt_tokens += len(sequence.prompt)
        for _ in range(needed):
            page = self.pool.take()
            assert page is not None, "they were counted"
            sequence.pages.append(page)
        self.running.append(sequence)
        sequence.entered = sequence.entered or monotonic()
        return True

    def _shared(self, sequence: LiveSequence) -> list[int]:
        """Pages of the store with the sequence's prefix; the last token is always computed, for its logits."""
        pages: list[int] = []
        for key in sequence.page_keys[: (sequence.length - 1) // PAGE]:
            page = self.pool.share(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def _rows(self) -> list[tuple[LiveSequence, StepRow]]:
        """The sequences of the next step, those of one adapter together, and their tokens."""
        budget, proposals = self._chunk_tokens, self._proposals()
        chosen: list[tuple[LiveSequence, int]] = []
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # it gave its pages to another one
            if sequence.num_missing == 1 and sequence.drawn:
                if self._make_room(sequence):
                    self._propose(sequence, proposals.get(sequence, []))
                    chosen.append((sequence, 1 + len(sequence.proposed)))
            elif budget > 0:
                count = min(sequence.num_missing, budget) if self._model.is_paged else sequence.num_missing
                budget -= count
                chosen.append((sequence, count))
        alive = [(sequence, count) for sequence, count in chosen if sequence in self.running]
        alive.sort(key=lambda each: b"" if each[0].adapter is None else each[0].adapter.digest)
        return [(sequence, _row(sequence, count)) for sequence, count in alive]

    def _make_room(self, sequence: LiveSequence) -> bool:
        """Get a page for the next token; where there is none, the newest sequences wait again."""
        while sequence.pages_for(sequence.length):
            page = self.pool.take()
            if page is not None:
                sequence.pages.append(page)
                continue
            newest = self.running[-1]
            self._leave(newest)
            self.waiting.appendleft(newest)
            self.counters.preempted += 1
            if newest is sequence:
                return False
        return True

    def _proposals(self) -> dict[LiveSequence, list[int]]:
        """Tokens that may follow the last one of each running sequence."""
        if not self._speculates or len(self.running) > SPECULATION_ROWS:
            return {}
        found: dict[LiveSequence, list[int]] = {}
        for sequence in self.running:
            if sequence.num_missing == 1 and sequence.drawn:
                found[sequence] = sequence.lookup.propose(sequence.prompt, sequence.drawn, sequence.num_left - 1)
                sequence.pace = sequence.lookup.pace
        if self._drafter is not None:
            drafted = self._drafter.propose([sequence for sequence, tokens in found.items() if not tokens])
            for sequence, tokens in drafted.items():
                found[sequence], sequence.pace = tokens, sequence.draft_pace
        return found

    def _propose(self, sequence: LiveSequence, found: list[int]) -> None:
        """Propose tokens behind the last one, as far as there are more free pages than sequences that may need one."""
        sequence.proposed = []
        while sequence.pages_for(sequence.length + len(found)):
            page = self.pool.take() if self.pool.num_available > len(self.running) else None
            if page is None:
                found = found[: len(sequence.pages) * PAGE - sequence.length]
            else:
                sequence.pages.append(page)
        sequence.proposed = found
        self.counters.proposed_tokens += len(found)

    def _stored(self, sequence: LiveSequence, count: int) -> None:
        """Count tokens as stored, and remember the full pages of the prompt."""
        before = sequence.num_stored // PAGE
        sequence.num_stored += count
        for index in range(before, min(sequence.num_stored // PAGE, len(sequence.page_keys))):
            self.pool.keep(sequence.pages[index], sequence.page_keys[index])

    def _report_prompt(self, sequence: LiveSequence, row: StepRow, logits: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow the tokens of this chunk."""
        first, total = row.segment.first, len(sequence.prompt)
        targets = sequence.prompt[first + 1 : min(total, first + row.segment.count + 1)]
        if targets:
            own = scaled(logits[: len(targets)], self._model.form)
            number = sequence.sampling.prompt_logprobs
            sequence.prompt_logprobs += reported(own, own.new_tensor(targets).long(), [number] * len(targets))

    def _take(self, sequence: LiveSequence, drawn: Drawn, result: StepResult) -> bool:
        """Add a token that was drawn; False where the sequence has ended."""
        how = sequence.sampling
        if not drawn.is_finite:
            self._end(sequence, "error", result, "the logits are not finite; the weights are broken")
            return False
        if how.max_tokens == 0:  # only the prompt was asked for
            self._end(sequence, "length", result)
            return False
        sequence.add(drawn.token)
        self.counters.drawn_tokens += 1
        result.tokens.append((sequence, drawn.token, drawn.report))
        is_last = drawn.token in how.stop_ids
        if sequence.matcher is not None and not is_last:
            if not sequence.matcher.consume_token(drawn.token):
                self._end(sequence, "error", result, f"grammar: {sequence.matcher.get_error()}")
                return False
            is_last = sequence.matcher.is_stopped()
        if is_last:
            self._end(sequence, "stop", result)
        elif sequence.num_left <= 0:
            self._end(sequence, "length", result)
        else:
            return True
        return False

    def _end(self, sequence: LiveSequence, reason: EndReason, result: StepResult, error: str | None = None) -> None:
        self._leave(sequence)
        result.ended.append((sequence, reason, error))

    def _leave(self, sequence: LiveSequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_stored, sequence.proposed = [], 0, []
        self._model.forget(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)


def _row(sequence: LiveSequence, count: int) -> StepRow:
    segment, own = Segment(sequence.pages, sequence.num_stored, count), count - len(sequence.proposed)
    wanted: Sequence[int] = []
    if sequence.sampling.prompt_logprobs is not None and not sequence.drawn:
        wanted = range(count)
    elif own == sequence.num_missing:
        wanted = range(own - 1, count)
    ids = [*sequence.tokens(sequence.num_stored, own), *sequence.proposed]
    return StepRow(ids, segment, sequence.adapter, wanted, sequence)
