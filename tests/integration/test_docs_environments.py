"""docs/environments.md is a tutorial: its files are written, its commands typed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from project import BIN, Project

PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
FILES = re.findall(r"```(?:python|json|yaml) (\S+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def test_the_tutorial_can_be_followed(project: Project) -> None:
    for name, text in FILES:
        (project.root / name).write_text(text)
    said = {}
    for command in COMMANDS:
        program, *arguments = command.split()
        assert program == "trainer"
        done = project.start([str(BIN / "trainer"), *arguments], {"PATH": f"{BIN}:{os.environ['PATH']}"}).wait()
        assert done.code == 0, f"{command}: {done.said}"
        said[command] = done.stdout
    assert len(said) == 9
    played = said["trainer check words.yaml --rewards"]
    assert "gold     mean reward 1.000, 4 turns, ended: done 4" in played
    assert "silent   mean reward 0.000, 12 turns, ended: done 4" in played
    shown = said["trainer rollouts words"]
    assert "Say the word" in shown
    assert re.search(r"ended: (done|length|max_turns)", shown)
    assert "assistant" in said["trainer rollouts products --full"]
