"""Names of the built-in rewards and where each lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

BUILT_IN: Final[Mapping[str, str]] = {
    "last_number": "trainer.rewards.last_number:last_number",
    "exact_match": "trainer.rewards.text:exact_match",
    "regex_match": "trainer.rewards.text:regex_match",
    "json_schema": "trainer.rewards.structured:json_schema",
    "math_verify": "trainer.rewards.mathematics:math_verify",
    "soft_overlong": "trainer.rewards.length:soft_overlong",
    "code_tests": "trainer.rewards.code_tests:code_tests",
    "http_reward": "trainer.rewards.http_reward:http_reward",
}
"""`use: last_number` in a recipe is short for the second column."""
