"""`trainer docs`: the pages of the documentation, which messages name, without a network."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.starter.shipped import pages


def docs(arguments: argparse.Namespace) -> int:
    """Print a page, or list them with their titles.

    Raises:
        UserError: there is no such page.
    """
    known = pages()
    if arguments.page is None:
        width = max(map(len, known))
        for name, file in known.items():
            title = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            sys.stdout.write(f"{name.ljust(width)}  {title}\n")
        return 0
    wanted = Path(arguments.page).stem
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known)}"
        raise UserError(f"no page {arguments.page}; {hint}")
    sys.stdout.write(known[wanted].read_text(encoding="utf-8"))
    return 0
