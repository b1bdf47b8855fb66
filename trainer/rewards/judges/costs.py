"""What judges cost: calls, tokens, answers from the cache; the `perf/judge_*` metrics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Final, final

COUNTS: Final = (
    "judge_calls",
    "judge_retries",
    "judge_cache_hits",
    "judge_prompt_tokens",
    "judge_completion_tokens",
    "judge_outage_s",
    "judge_unscored",
)
"""Requests answered, attempts that failed and were repeated, answers from the cache, tokens as the server counts them,
seconds without an answering server, completions that abstained or failed because of an outage."""


@final
class JudgeCosts:
    """Counters of one process; threads add to them."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **counts: float) -> None:
        """Add to counters, without their prefix `judge_`."""
        with self._lock:
            for name, count in counts.items():
                assert f"judge_{name}" in COUNTS, name
                self._counts[f"judge_{name}"] += count  # type: ignore[assignment] # seconds are no whole number

    def take(self) -> Mapping[str, float]:
        """The counts since the last call."""
        with self._lock:
            taken = {name: float(self._counts[name]) for name in COUNTS}
            self._counts.clear()
        return taken
