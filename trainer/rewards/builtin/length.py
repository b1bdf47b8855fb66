"""Penalize long completions: DAPO's soft overlong punishment (arXiv:2503.14476, equation 13).

    R(y) = 0                                   if |y| <= L_max - L_ramp
    R(y) = ((L_max - L_ramp) - |y|) / L_ramp   if L_max - L_ramp < |y| <= L_max
    R(y) = -1                                  if L_max < |y|

|y| is the number of characters here, since a reward sees text and no tokens; the paper counts tokens. English has about
four characters a token. `algorithm.overlong` handles completions cut at `max_completion_tokens`.
"""

from __future__ import annotations

from trainer.types import Row


def soft_overlong(completion: str, row: Row, *, max_characters: int, ramp_characters: int) -> float:
    """0.0 for a short completion, down to -1.0 for one of `max_characters` or more.

    >>> [soft_overlong("x" * n, {}, max_characters=100, ramp_characters=20) for n in (80, 90, 100, 101)]
    [0.0, -0.5, -1.0, -1.0]

    Args:
        completion: what the model wrote.
        row: not read.
        max_characters: L_max, where the penalty reaches -1.
        ramp_characters: L_ramp, how far before that it begins.
    """
    if not 0 < ramp_characters <= max_characters:
        raise ValueError(f"ramp_characters must be in 1..{max_characters}, got {ramp_characters}")
    length = len(completion)
    free = max_characters - ramp_characters
    if length <= free:
        return 0.0
    return (free - length) / ramp_characters if length <= max_characters else -1.0
