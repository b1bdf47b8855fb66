"""Print tables: aligned and coloured on a terminal, one plain line per row elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.table import Table

UNLIMITED: Final = 100_000
"""Width that no row reaches, so that no line is wrapped or cut."""


def table_lines(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows as aligned lines of plain text, for logs, pipes and grep.

    >>> table_lines([("a", "bb"), ("ccc", "d")])
    ['a    bb', 'ccc  d']
    """
    from rich.console import Console  # not at the top: `trainer --help` stays fast

    if not rows:
        return []
    text = io.StringIO()
    Console(file=text, width=UNLIMITED).print(_table(rows))
    return [f"{indent}{line}".rstrip() for line in text.getvalue().splitlines()]


def write_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    """Write a table to stdout; the header appears on a terminal only.

    Args:
        rows: cells, as many in each row as the header has.
        header: column titles.
    """
    if sys.stdout.isatty() and rows:
        from rich.console import Console

        Console(file=sys.stdout).print(_table(rows, header))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in table_lines(rows)))


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=header is not None, padding=(0, 2, 0, 0), pad_edge=False)
    for index in range(len(rows[0])):
        is_last = index == len(rows[0]) - 1
        table.add_column(header[index] if header is not None else "", no_wrap=not is_last, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in a cell are no markup
    return table
