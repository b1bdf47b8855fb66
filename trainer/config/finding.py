"""What is wrong with a recipe, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from trainer.config.document import KeyPath


@final
@dataclass(frozen=True)
class Finding:
    """A contradiction (error) or a questionable setting (warning), at the field to look at."""

    path: KeyPath
    text: str
    is_error: bool = True
