"""Which rewards judge a row, where a column of the rows chooses them (`reward_column`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from trainer.errors import RewardError
from trainer.types import Row, read_field


class Named(Protocol):
    """The fields of a recipe's reward that choose it."""

    @property
    def name(self) -> str:
        """By which rows choose it."""

    @property
    def every_row(self) -> bool:
        """Whether it judges every row."""


@final
@dataclass(frozen=True)
class RewardChoice:
    """Chooses the rewards of each row.

    >>> from trainer.config.rft_sections import RewardSpec
    >>> specs = (RewardSpec(use="last_number"), RewardSpec(use="code_tests"), RewardSpec(use="a:form", every_row=True))
    >>> RewardChoice("task", specs).of_row(Row({"task": "code_tests"})), RewardChoice(None, specs).of_row(Row({}))
    ((1, 2), (0, 1, 2))
    """

    column: str | None
    """Field of the rows with a name or a list of names, dotted where it is nested; None: every reward judges every row.
    """
    specs: Sequence[Named]

    def of_row(self, row: Row) -> tuple[int, ...]:
        """Positions of the rewards that judge the row.

        Raises:
            RewardError: the column is missing, or names an unknown reward or none; names file and line.
        """
        if self.column is None:
            return tuple(range(len(self.specs)))
        try:
            value = read_field(row, self.column)
        except KeyError:
            raise RewardError(
                f"{row}: no field `{self.column}` (reward_column); the row has: {', '.join(row)}"
            ) from None
        wanted = [value] if isinstance(value, str) else value
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise RewardError(f"{row}: {self.column} must name a reward, or be a list of names (got {value!r:.80})")
        names = [spec.name for spec in self.specs]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            meant = f"; did you mean `{near[0]}`?" if near else f"; the recipe has {', '.join(names)}"
            raise RewardError(f"{row}: {self.column} names no reward of the recipe: `{unknown[0]}`{meant}")
        chosen = tuple(index for index, spec in enumerate(self.specs) if spec.every_row or spec.name in wanted)
        if not chosen:
            raise RewardError(f"{row}: {self.column} is an empty list, and no reward has `every_row: true`")
        return chosen
