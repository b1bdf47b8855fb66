"""Finds the answer within a completion: behind the thinking, in a fenced block of code."""

from __future__ import annotations

import re
import textwrap
from typing import Final

FENCE: Final = re.compile(r"^(?P<indent>[ \t]*)(?P<marks>```+|~~~+)[ \t]*(?P<language>[\w+.-]*)[^\n`]*$")
PYTHON: Final = frozenset({"python", "python3", "py", "py3"})


def after_thinking(text: str) -> str:
    r"""Return what stands behind the last closed block of thinking, or the whole text.

    >>> after_thinking("<think>\n1?\n</think>\n2"), after_thinking("1?</think>2"), after_thinking("<think>1?")
    ('\n2', '2', '')

    A block that was opened and never closed holds no answer.
    """
    _, closing, rest = text.rpartition("</think>")
    if closing:
        text = rest
    return text.partition("<think>")[0]


def python_blocks(text: str) -> list[str]:
    r"""Return the fenced blocks of Python in a text, in order; blocks without a language where none says Python.

    >>> python_blocks("```Python\r\nx = 1\r\n```\n- item:\n  ```py\n  y = 2\n  ```\n```json\n{}\n```")
    ['x = 1\n', 'y = 2\n']
    >>> python_blocks("```\nz = 3\n```"), python_blocks("no block"), python_blocks("```js\n1\n```")
    (['z = 3\n'], [], [])

    A block that is not closed reaches to the end of the text.
    """
    labelled: list[str] = []
    bare: list[str] = []
    lines: list[str] | None = None
    opened: re.Match[str] | None = None

    def close() -> None:
        assert opened is not None
        language = opened["language"].lower()
        blocks = labelled if language in PYTHON else bare if not language else None
        if blocks is not None:
            blocks.append(textwrap.dedent("".join(line + "\n" for line in lines or [])))

    for line in re.split(r"\r\n|\n|\r", text):
        found = FENCE.match(line)
        if opened is None:
            if found is not None:
                opened, lines = found, []
        elif (
            found is not None
            and not found["language"]
            and found["marks"][0] == opened["marks"][0]
            and len(found["marks"]) >= len(opened["marks"])
        ):
            close()
            opened = None
        else:
            assert lines is not None
            lines.append(line)
    if opened is not None:
        close()
    return labelled or bare
