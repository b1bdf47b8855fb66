"""A recipe translated from another tool, with an account of every field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, final

Value = Any
"""As YAML has it."""


@final
@dataclass
class Translation:
    """A recipe, and an account of every field of the other configuration."""

    tool: str
    recipe: dict[str, Value] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    """`sequence_len -> data.max_seq_tokens: 2048`."""
    not_needed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """What the user must decide."""

    def put(self, name: str, ours: str, value: Value) -> None:
        """Set a field of the recipe, such as `data.max_seq_tokens`."""
        section = self.recipe
        *path, last = ours.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
        self.done.append(f"{name} -> {ours}: {json.dumps(value, ensure_ascii=False)}")

    def leave(self, name: str, value: Value, why: str) -> None:
        """Note a field that has no equal."""
        self.left.append(f"{name}: {value!r:.60}: {why}")
