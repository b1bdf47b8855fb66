"""Build the documentation as a site, strictly: a link without a target, or an API name that is gone, is an error.

Pages link to files outside docs/, such as benchmark results, as a reader of the repository needs them. A site has only
its own pages, so the build works on a copy, into which those files are taken.

    scripts/docs            makes .venv-docs and builds build/docs/site
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "build" / "docs"
OUTSIDE: Final = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)]*)?\)")
LOCAL_LINK: Final = re.compile(r"\[([^\]]*)\]\((?!https?://)[^)]*\)")


def main() -> int:
    """Copy, take the linked files in, build; returns the exit code of zensical."""
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "docs", BUILD / "docs")
    for page in sorted((BUILD / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in OUTSIDE.finditer(text):
            take_in(match[1])
        page.write_text(OUTSIDE.sub(lambda match: f"]({site_path(match[1])})", text), encoding="utf-8")
    shutil.copy(ROOT / "mkdocs.yml", BUILD)
    (BUILD / "trainer").symlink_to(ROOT / "trainer")  # for the API pages
    zensical = Path(sys.executable).with_name("zensical")
    return subprocess.run([str(zensical), "build", "--strict", "--clean"], cwd=BUILD, check=False).returncode


def site_path(name: str) -> str:
    """Where a file of the repository lies in the site; code is shown as a page."""
    return f"repository/{name}" if name.endswith(".md") else f"repository/{name}.md"


def take_in(name: str) -> None:
    """Copy a file of the repository into the site: Markdown without its links, anything else as a code block."""
    source, target = ROOT / name, BUILD / "docs" / site_path(name)
    if not source.is_file():
        return  # the strict build names the link
    target.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text(encoding="utf-8")
    if not name.endswith(".md"):
        text = f"# {name}\n\n```{source.suffix.removeprefix('.')}\n{text}\n```\n"
    else:
        text = LOCAL_LINK.sub(r"\1", text)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
