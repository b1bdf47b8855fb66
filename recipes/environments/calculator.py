"""A tool for sums that a small model cannot do in its head."""

from __future__ import annotations


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers."""
    return a * b
