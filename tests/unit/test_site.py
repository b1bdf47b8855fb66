"""Links lead somewhere, commands in pages parse, the navigation is whole, the Dockerfile is clean."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.commands.cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "datasets/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
COMMAND = re.compile(r"^\s*(?:\$ )?(trainer [a-z][^\n]*)$", re.MULTILINE)
PLACEHOLDERS = ("...", "[", "|", "COMMAND", "<")


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_it_parses(page: Path) -> None:
    """Placeholders (RUN, RECIPE) are words like any other; lines with brackets describe syntax."""
    parser, names = _parser()
    for line in COMMAND.findall(page.read_text(encoding="utf-8")):
        command = re.split(r"\s+#|\s{2,}|\s>\s|\s\|\s", line)[0].rstrip("\\ ")
        words = shlex.split(command)[1:]
        if words[0] not in names or any(mark in command for mark in PLACEHOLDERS):
            continue
        values = ["4" if word in {"N", "STEP"} else word for word in words]
        try:
            parser.parse_args(values)
        except SystemExit:
            pytest.fail(f"{page.name}: `{command}` does not parse")


def test_the_navigation_has_every_page_once() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else []
        return [page for each in inner for page in pages(each)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_api_page_names_what_exists() -> None:
    import importlib

    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(names) >= 9
    for name in names:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def test_the_dockerfile_is_clean_and_runs_as_a_user_with_a_home() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for name in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / part).exists() for part in name.split()), name
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
    assert re.search(r"^ENV HOME=", text, re.MULTILINE)
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
