#!/usr/bin/env python
"""Write the JSONL files under datasets/, the same bytes every time.

python scripts/make_datasets.py            write them
python scripts/make_datasets.py --check    exit 1 if a file differs from what this script generates
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from datasets_code import make_code_rows
from datasets_extract import make_extract_rows
from datasets_json import make_json_rows
from datasets_random import Draws
from datasets_sql import make_sql_rows
from datasets_sums import make_sums_rows
from datasets_turns import make_calculator_demos, make_calculator_rows, make_guess_demos, make_guess_rows

DIRECTORY: Final = Path(__file__).resolve().parent.parent / "datasets"
SPLITS: Final = ("train", "heldout")
MAKERS: Final[Mapping[str, Callable[[str, Draws], list[dict[str, Any]]]]] = {
    "extract": make_extract_rows,
    "sums": make_sums_rows,
    "json_rft": make_json_rows,
    "code_rft": make_code_rows,
    "calculator_sft": make_calculator_demos,
    "calculator_rft": make_calculator_rows,
    "guess_sft": make_guess_demos,
    "guess_rft": make_guess_rows,
    "sql_rft": make_sql_rows,
}


def make_file(name: str, split: str) -> str:
    """Return the text of one file."""
    rows = MAKERS[name](split, Draws(f"{name} {split}"))
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> int:
    """Write the files, or list those that differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file differs")
    check = parser.parse_args().check
    num_stale = 0
    for name in MAKERS:
        for split in SPLITS:
            path = DIRECTORY / f"{name}_{split}.jsonl"
            text = make_file(name, split)
            if path.is_file() and path.read_bytes() == text.encode():
                continue
            num_stale += 1
            print(f"{path.relative_to(DIRECTORY.parent)}: {'differs' if check else 'written'}")
            if not check:
                path.write_text(text, encoding="utf-8", newline="\n")
    if check and num_stale:
        print("run: python scripts/make_datasets.py", file=sys.stderr)
    return 1 if check and num_stale else 0


if __name__ == "__main__":
    sys.exit(main())
