"""What an sft run answers to a few rows before and after training, for the report. For training/sft.py only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from trainer.config.recipe import DataSettings
from trainer.data.chat import ChatEncoder
from trainer.data.forms import read_conversation, read_plain_text
from trainer.data.sources import stream_rows
from trainer.data.turns import trained_indices
from trainer.errors import DataError, PreemptedError, TrainerError
from trainer.files import make_directory, write_atomically
from trainer.model.policy import Policy
from trainer.run.journal import JournalPrompt, json_line
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.training.attempt import Attempt
from trainer.types import Completion, Row

MAX_TOKENS: Final = 128
"""Tokens of an answer; a longer one is cut."""
MAX_READ: Final = 64
"""Rows that are looked at to find some with a prompt that fits."""
DECODER_ERRORS: Final = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the code of foreign models raises where it cannot be sampled from; out of memory is a RuntimeError."""


@final
@dataclass(frozen=True)
class AskedRow:
    """A row up to its last trained turn, and what the row says there."""

    prompt: JournalPrompt
    token_ids: tuple[int, ...]
    """Exactly the tokens before the trained ones, as in training."""
    room: int
    """Tokens that the answer may have."""


@final
class SampleAnswers:
    """Answers the same rows before the first step and after the last one; the likeliest token each time.

    Nothing that is trained depends on it: it draws no random numbers, and what it allocates is gone afterwards. A
    failure is said and never stops the run.
    """

    def __init__(self, attempt: Attempt, encoder: ChatEncoder) -> None:
        """Nothing is read yet.

        Args:
            attempt: whose main rank answers, at step 0 and at the last step.
            encoder: how rows became tokens.
        """
        self._attempt, self._encoder = attempt, encoder

    def record(self, policy: Policy) -> None:
        """Answer the rows and write the answers, unless this step has them already or none are wanted.

        Args:
            policy: answers.
        """
        attempt, wanted = self._attempt, self._attempt.plan.recipe.logging.answers
        file = attempt.run.answers(attempt.step)
        if wanted == 0 or not attempt.world.is_main or attempt.step not in {0, attempt.plan.steps} or file.exists():
            return
        began = time.perf_counter()
        try:
            text = self._answers(policy, wanted)
            make_directory(file.parent)
            write_atomically(file, text)
        except (TrainerError, OSError, *DECODER_ERRORS) as error:
            attempt.say(f"no answers are recorded after step {attempt.step}: {(str(error).splitlines() or [''])[0]}")
            return
        attempt.say(
            f"{text.count(chr(10))} rows answered after step {attempt.step} in {time.perf_counter() - began:.1f} s"
        )

    def _answers(self, policy: Policy, wanted: int) -> str:
        """The lines of the file.

        Raises:
            TrainerError: the model cannot be sampled from here, or no row has a prompt.
        """
        recipe = self._attempt.plan.recipe
        source = recipe.data.eval or recipe.data.train
        rows = list(_first(asked_rows(self._encoder, stream_rows(source, recipe.data, MAX_READ), recipe.data), wanted))
        if not rows:
            raise DataError(f"none of the first {MAX_READ} rows has a prompt that leaves room for an answer")
        part = "held-out" if recipe.data.eval is not None else "training"
        completions = self._completions(policy, rows)
        records = [
            row.prompt.record() | {"part": part, "answers": [_record(completion)]}
            for row, completion in zip(rows, completions, strict=True)
        ]
        return "".join(map(json_line, records))

    def _completions(self, policy: Policy, rows: Sequence[AskedRow]) -> list[Completion]:
        """The likeliest answer to each row."""
        was_training = policy.training
        policy.eval()
        try:
            sampler = LocalSampler(policy, self._encoder.tokenizer, may_copy=self._may_copy())
            sampler.publish(policy, 0)
            drawn: dict[int, Completion] = {}
            for room in sorted({row.room for row in rows}):
                requests = [SampleRequest(row.token_ids, row.prompt.row, 1) for row in rows if row.room == room]
                params = SamplingParams(room, self._encoder.stop_ids, seed=0, step=0, is_greedy=True)
                completions = sampler.sample(requests, params, self._on_tokens)
                drawn |= {request.row: each for request, (each,) in zip(requests, completions, strict=True)}
            return [drawn[row.prompt.row] for row in rows]
        finally:
            policy.train(was_training)
            if policy.device.type == "cuda":
                torch.cuda.empty_cache()

    def _may_copy(self) -> bool:
        """Whether a copy of the weights takes no more memory than a training step, so that the peak stays the same."""
        memory = self._attempt.plan.memory
        return memory is not None and memory.weights_gib <= memory.phases["learning"]

    def _on_tokens(self, index: int, token_ids: Sequence[int]) -> None:
        """A token was drawn: the rank is alive, and ends where it is asked to.

        Raises:
            PreemptedError: it was asked to stop.
        """
        del index, token_ids
        self._attempt.stop.moved()
        if self._attempt.stop.reason is not None:
            raise PreemptedError("the run was asked to stop")


def asked_rows(encoder: ChatEncoder, rows: Iterator[Row], data: DataSettings) -> Iterator[AskedRow]:
    """The rows that have a prompt which leaves room for an answer, in their order.

    Args:
        encoder: of training.
        rows: as they are read.
        data: how they are read.

    Raises:
        DataError: a row cannot be trained on.
    """
    for row in rows:
        (sequences,) = encoder.tokenize([encoder.prepare(row)])
        kept, was_truncated = encoder.within_limit(sequences)
        if not kept or was_truncated:
            continue
        mask = kept[-1].loss_mask
        end = len(mask) - mask[::-1].index(True)
        begin = next((place + 1 for place in range(end - 1, -1, -1) if not mask[place]), 0)
        room = min(MAX_TOKENS, data.max_seq_tokens - begin)
        prompt = _prompt(row, data)
        if begin > 1 and room >= 1 and prompt is not None:
            yield AskedRow(prompt, kept[-1].token_ids[:begin], room)


def _prompt(row: Row, data: DataSettings) -> JournalPrompt | None:
    """What the row asks in its last trained turn, with the answer that the row has; None for a text without prompt."""
    if data.format == "text":
        plain = read_plain_text(row, data)
        messages: list[dict[str, Any]] = [{"role": "text", "content": plain.prompt}]
        return (
            JournalPrompt(row.index, str(row), tuple(messages), {"completion": plain.completion})
            if plain.prompt
            else None
        )
    chat = read_conversation(row, data, with_completion=True)
    last = trained_indices(row, chat, data)[-1]
    gold = chat.messages[last]
    fields = {"completion": gold["content"]} | ({"tool_calls": gold["tool_calls"]} if gold.get("tool_calls") else {})
    return JournalPrompt(row.index, str(row), tuple(chat.messages[:last]), fields)


def _first(rows: Iterator[AskedRow], number: int) -> Iterator[AskedRow]:
    for _, row in zip(range(number), rows, strict=False):
        yield row


def _record(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
    }
