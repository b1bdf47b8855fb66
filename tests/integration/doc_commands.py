"""The commands in the README and in docs/: found in code blocks and in the text, placeholders filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
FIRST: Final = ("start", "README", "jobs", "using", "report", "serving")
"""Read in this order, as a new user would; their commands make the runs that other pages use."""
NO_GUIDES: Final = ("architecture", "decisions", "log", "models")
"""For those who change the code; a record of decisions, one of measurements, and a generated table."""
ELSEWHERE: Final = {
    "accounts": "test_operator_walk.py types its commands",
    "deployments": "needs a server with accounts and its key; test_operator_walk.py and test_deployments.py have one",
    "security": "names commands of these two pages",
    "training_api": "test_docs_training_api.py runs its loops, test_training_api.py its server and clients",
}
"""Guides whose commands need what this project does not have, and where they are run."""
PROGRAMS: Final = (
    "trainer",
    "python",
    "pip",
    "accelerate",
    "docker",
    "sky",
    "kubectl",
    "curl",
    "ssh",
    "hf",
    "tensorboard",
)
BLOCK: Final = re.compile(r"(?:^|\n\n)((?: {4}[^\n]*(?:\n|$)|\n(?= {4}))+)|```(\w*)[^\n]*\n(.*?)```", re.DOTALL)
SPAN: Final = re.compile(r"`([^`\n]+)`")
COMMENT: Final = re.compile(r"\s+#\s.*|\s{2,}.*")
PLACEHOLDERS: Final = (
    (r"(?<=trainer rollouts )RUN\b", "rft_quickstart"),
    (r"(?<=trainer check )RECIPE(?= --rewards)", "recipes/rft_quickstart.yaml"),
    (r"(?<=--step )N\b|(?<=--checkpoint )STEP\b", "1"),
    (r"(?<=--print )NAME\b|(?<=--shape )NAME\b", "h200x1"),
    (r"\bRUN RUN\b", "my_run other_run"),
    (r"\bruns/NAME\b", "runs/my_run"),
    (r"\bRUN\b", "my_run"),
    (r"\bRECIPE\b", "recipe.yaml"),
)
"""What the pages write in capitals, and what this project has for it."""


@dataclass(frozen=True)
class Command:
    """A command, and the pages that have it."""

    text: str
    """Placeholders filled in; may have pipes and redirections."""
    page: str
    """The first page with it."""

    def __str__(self) -> str:
        """For the names of tests."""
        return f"{self.page}: {self.text}"


def pages() -> list[Path]:
    """The README and the guides, in the order of reading."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/README.md"]
    order = {name: number for number, name in enumerate(FIRST)}
    return sorted(
        (page for page in found if page.stem not in (*NO_GUIDES, *ELSEWHERE)),
        key=lambda page: order.get(page.stem, len(order)),
    )


def commands() -> list[Command]:
    """Every command once, in the order of reading.

    A command stands in an indented block, in a block of bash or sh, or in the text between backquotes with an argument;
    `console` blocks are typed by test_docs_environments.py.
    """
    found: dict[str, Command] = {}
    for page in pages():
        name = "examples" if page.parent.name == "examples" else page.stem
        for text in _commands_of(page.read_text(encoding="utf-8")):
            for placeholder, value in PLACEHOLDERS:
                text = re.sub(placeholder, value, text)
            found.setdefault(text, Command(text, name))
    return list(found.values())


def _commands_of(page: str) -> list[str]:
    """Commands of a page, in their order, as they are written."""
    found: list[tuple[int, str]] = []
    for block in BLOCK.finditer(page):
        indented, kind, fenced = block.groups()
        if indented is not None or kind in {"bash", "sh"}:
            text = re.sub(r"\\\n\s*", "", fenced if indented is None else indented)
            found += [(block.start(), command) for line in text.splitlines() if (command := _command(line))]
    outside = BLOCK.sub(lambda block: " " * len(block.group()), page)
    for span in SPAN.finditer(outside):
        text = span.group(1)
        if text.startswith("trainer ") and len(text.split()) > 2 and "|" not in text:
            found.append((span.start(), text))
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def _command(line: str) -> str | None:
    """The command of a line without its comment; None for output, recipes and the like."""
    text = COMMENT.sub("", line.strip())
    words = [word for word in text.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    is_command = bool(words) and (
        words[0] in PROGRAMS or words[0].startswith(("scripts/", ".venv")) or words[0] == "echo"
    )
    return text if is_command else None
