"""Durations as people write them: 90s, 5m, 12h, 30d."""

from __future__ import annotations

import re
from typing import Final

from trainer.errors import UserError

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(words: str, option: str) -> float:
    """A duration in seconds.

    >>> seconds_of("5m", "--window"), seconds_of("1.5h", "--window"), seconds_of("20", "--window")
    (300.0, 5400.0, 20.0)

    Args:
        words: a number with a unit of UNITS; seconds without one.
        option: shown in the error.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", words)
    if match is None:
        raise UserError(f"{option} {words}: write a duration as 90s, 5m, 12h or 30d")
    return float(match[1]) * UNITS[match[2] or "s"]
