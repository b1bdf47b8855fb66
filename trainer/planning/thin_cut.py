"""How matrices are cut for the kernels of trainer/model/thin.py, and the bytes of their partial sums. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, final

ROWS: Final = 256
"""Rows of a strip in the kernel `gradients`."""
GATED_ROWS: Final = 128
"""Rows of a strip in `swiglu` and `swiglu_gradients`."""
COLUMNS: Final = 64
"""Columns that a program reads at a time."""
PROGRAMS: Final = 132
"""Wanted at least, of about equal work: one for each processor of an H100."""
MAX_RANK: Final = 32
"""Of the kernels: above it, partial sums are more bytes than a second reading."""


@final
@dataclass(frozen=True)
class Cut:
    """How a matrix [T, sum of widths] is cut into programs: strips of rows, and parts of each layer's columns."""

    num_rows: int
    num_strips: int
    columns_per_part: int
    ends: tuple[int, ...]
    """Columns of the first layer, of the first two, and so on."""
    parts: tuple[int, ...]
    """The same of parts."""

    @classmethod
    def of(cls, num_rows: int, widths: Sequence[int], rows_per_strip: int) -> Cut:
        """The cut for at least `PROGRAMS` programs.

        >>> Cut.of(4096, [4096, 1024, 1024], 256)
        Cut(num_rows=4096, num_strips=16, columns_per_part=768, ends=(4096, 5120, 6144), parts=(6, 8, 10))

        Args:
            num_rows: T.
            widths: columns of each layer.
            rows_per_strip: of a program.
        """
        num_strips = -(-num_rows // rows_per_strip)
        wanted = max(1, PROGRAMS // num_strips)
        columns = -(-sum(widths) // (wanted * COLUMNS)) * COLUMNS
        parts = accumulate(-(-width // columns) for width in widths)
        return cls(num_rows, num_strips, columns, tuple(accumulate(widths)), tuple(parts))

    def of_first_two(self) -> tuple[int, int, int, int]:
        """Ends of the first layer and of the first two, and their parts; of three layers at most."""
        ends, parts = (*self.ends, *self.ends[-1:] * 2), (*self.parts, *self.parts[-1:] * 2)
        return ends[0], ends[1], parts[0], parts[1]

    def partial_bytes(self, rank: int, *, of_parts: int = 1, of_strips: int = 1) -> float:
        """Bytes of partial sums in float32, written once and read once.

        Args:
            rank: r.
            of_parts: results [T, r] that are summed over the parts of a layer.
            of_strips: results [width, r] that are summed over strips.
        """
        values = of_parts * self.parts[-1] * self.num_rows + of_strips * self.num_strips * self.ends[-1]
        return 2.0 * 4.0 * rank * values
