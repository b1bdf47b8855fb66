"""Tables on the terminal: aligned, and folded to its width; plain unfolded lines elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

UNLIMITED_WIDTH: Final = 100_000


def table_lines(
    rows: Sequence[Sequence[str]], *, indent: int = 0, width: int | None = None, is_dim: Sequence[bool] | None = None
) -> list[str]:
    """Return rows as aligned lines.

    >>> table_lines([("a", "bb"), ("ccc", "d")])
    ['a    bb', 'ccc  d']

    Args:
        rows: Cells of each row.
        indent: Spaces before each line.
        width: Width of the terminal, to which long cells are folded; None writes each row as one line.
        is_dim: Which rows are dimmed, by ANSI codes; None dims none and writes no codes.
    """
    from rich.console import Console  # imported here to keep other commands fast
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0]:
        table.add_column(overflow="fold", no_wrap=width is None)
    for number, row in enumerate(rows):
        dimmed = is_dim is not None and is_dim[number]
        table.add_row(*(Text(cell) for cell in row), style="dim" if dimmed else None)
    console = Console(
        file=io.StringIO(),
        width=width or UNLIMITED_WIDTH,
        force_terminal=is_dim is not None,
        color_system="standard" if is_dim is not None else None,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(Padding(table, (0, 0, 0, indent), expand=False))
    return [line.rstrip() for line in capture.get().splitlines()]
