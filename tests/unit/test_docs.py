"""docs/architecture.md names files that exist, and every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = sorted(path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py"))
TABLE_ROW = re.compile(r"^\| \d+ \| (.+?) \|.*\| (.*) \|$", re.MULTILINE)


def test_every_room_has_a_row_in_the_table() -> None:
    rows = " ".join(room for room, _ in TABLE_ROW.findall(PAGE))
    assert [room for room in ROOMS if f"`{room}/`" not in rows] == []


def test_the_table_names_modules_that_exist() -> None:
    named = [
        (room, module)
        for cell, modules in TABLE_ROW.findall(PAGE)
        for room in re.findall(r"`(\w+/)`", cell)
        for module in re.findall(r"`([\w.]+/?)`", modules)
    ]
    assert len(named) > len(ROOMS)
    assert [room + module for room, module in named if not (ROOT / "trainer" / room / module).exists()] == []


def test_paths_in_the_text_exist() -> None:
    paths = re.findall(r"`(\w+/\w+\.py)`", PAGE)
    assert len(paths) > 50
    missing = [path for path in paths if not (ROOT / "trainer" / path).is_file() and not (ROOT / path).is_file()]
    assert missing == []
