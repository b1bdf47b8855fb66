"""Token sequences of a conversation whose chat template drops the thinking of earlier turns, for tests."""

from __future__ import annotations

import torch
from tiny import VOCAB_SIZE

from trainer.data.tokens import TokenInputs, TokenSequence


def conversation(
    turns: int, *, prompt: int = 11, thought: int = 6, answer: int = 4, keeps: int = 0, owner: tuple[int, int] = (0, 1)
) -> list[TokenSequence]:
    """A sequence per turn: what was asked and answered before, then thinking and answer of the turn, which are trained.

    Args:
        turns: how many.
        prompt: tokens of each question.
        thought: tokens of thinking, which later sequences lack.
        answer: tokens of each answer.
        keeps: this many first turns have no thinking, so that later sequences repeat their trained tokens.
        owner: of the rollout.
    """
    generator = torch.Generator().manual_seed(turns)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())

    history: tuple[int, ...] = ()
    made = []
    for turn in range(turns):
        history += ids(prompt)
        said = ids(answer)
        drawn = (ids(thought) if turn >= keeps else ()) + said
        mask = (False,) * len(history) + (True,) * len(drawn)
        numbers = tuple((0.1 * torch.arange(1, len(drawn) + 1)).tolist())
        inputs = TokenInputs(weights=numbers, advantages=numbers, sampler_logprobs=numbers)
        made.append(TokenSequence(history + drawn, mask, inputs, "row", owner))
        history += said
    return made
