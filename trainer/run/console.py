"""Show the progress of a run: a bar on a terminal, lines elsewhere. No torch."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, TextIO, final

SHOWN: Final = {
    "train/loss": ("loss", "{:.4f}"),
    "rollout/reward": ("reward", "{:.3f}"),
    "train/ref_kld": ("ref_kld", "{:.2g}"),
    "train/ppo_kl": ("ppo_kl", "{:.2g}"),
    "train/entropy": ("entropy", "{:.2f}"),
    "rollout/completion_tokens": ("len", "{:.0f}"),
    "rollout/truncated_frac": ("cut", "{:.0%}"),
    "train/grad_norm": ("grad", "{:.2f}"),
    "train/learning_rate": ("lr", "{:.1e}"),
    "perf/tokens_per_s": ("tok/s", "{:.0f}"),
    "eval/loss": ("held-out loss", "{:.4f}"),
    "eval/reward": ("held-out reward", "{:.3f}"),
}
QUIET_S: Final = 30.0
"""Without a terminal: shortest time between two lines."""


def describe(record: Mapping[str, Any]) -> str:
    """The most important values of a metrics record, on one line.

    >>> describe({"step": 3, "train/loss": 0.71234, "perf/tokens_per_s": 244.2, "train/updates": 3})
    'loss 0.7123  tok/s 244'
    """
    return "  ".join(
        f"{label} {pattern.format(record[name])}" for name, (label, pattern) in SHOWN.items() if name in record
    )


def duration(seconds: float) -> str:
    """A duration for people.

    >>> duration(75), duration(4000), duration(8.4)
    ('1m15s', '1h06m', '8s')
    """
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def tell(text: str) -> None:
    """Write a line to stderr; a terminal that was closed never stops a run."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@final
class Console:
    """Progress on a stream, stderr by default; write errors never stop a run."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        """Prepare for a run of `steps` steps; the stream is stderr when None."""
        self.steps, self.stream = steps, sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._last_line = 0.0

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a metrics record."""
        step = int(record["step"])
        self._recent.append((float(record.get("time", time.time())), step))
        is_milestone = step in (0, self.steps) or any(name.startswith("eval/") for name in record)
        now = time.monotonic()
        text = f"{step}/{self.steps}  {describe(record)}{self._left(step)}"
        if self.is_terminal:
            self._write(f"\r\033[K{bar(step, self.steps)} {text}" + ("\n" if is_milestone else ""))
        elif is_milestone or now - self._last_line > QUIET_S:
            self._write(text + "\n")
            self._last_line = now

    def show_part(self, text: str) -> None:
        """Show how far a long task before the first step is."""
        now = time.monotonic()
        if self.is_terminal:
            self._write(f"\r\033[K{text}")
        elif now - self._last_line > QUIET_S:
            self._write(text + "\n")
            self._last_line = now

    def say(self, text: str) -> None:
        """Write a message on a line of its own."""
        self._write(("\r\033[K" if self.is_terminal else "") + text + "\n")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a full disk, or a closed pipe
            self.stream.write(text)
            self.stream.flush()

    def _left(self, step: int) -> str:
        seconds = seconds_left(self._recent, step, self.steps)
        return f"  {duration(seconds)} left" if seconds is not None and step < self.steps else ""


def bar(done: int, total: int) -> str:
    """A bar of 24 characters.

    >>> bar(5, 10)
    '[############............]'
    """
    width = 24
    filled = min(width, round(width * done / max(1, total)))
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def seconds_left(recent: deque[tuple[float, int]], step: int, steps: int) -> float | None:
    """Time left at the rate of recent steps; None where there is no rate yet.

    >>> seconds_left(deque([(100.0, 4), (106.0, 7)]), step=7, steps=10)
    6.0

    Args:
        recent: time in seconds and step of recent records, ascending.
        step: the current step.
        steps: all steps.
    """
    if len(recent) < 2 or recent[-1][1] <= recent[0][1]:
        return None
    (begin, first), (end, last) = recent[0], recent[-1]
    if end < begin:  # the clock was set back
        return None
    return (end - begin) / (last - first) * (steps - step)
