"""`--help` of each command has examples that parse and the exit codes; shells complete commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from trainer.commands.cli import _parser, main
from trainer.commands.help_text import EXAMPLES

ROOT = Path(__file__).parents[2]
PARSER, NAMES = _parser()


def test_every_command_has_examples() -> None:
    assert sorted(EXAMPLES) == sorted(NAMES)


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_commands(example: str) -> None:
    command = example.partition("   ")[0].partition(" > ")[0].partition(" | ")[0]
    assert PARSER.parse_args(shlex.split(command)[1:]).run is not None


@pytest.mark.parametrize("name", NAMES)
def test_help_says_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:\n  trainer " in shown
    assert "75  preempted: run the same command again" in shown


def test_pages_that_messages_name_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "docs/data.md"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert main(["docs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    assert main(["docs", "dta"]) == 2
    assert "no page dta; did you mean `data`?" in capsys.readouterr().err


def test_pages_in_messages_exist() -> None:
    named = {
        page
        for file in (ROOT / "trainer").rglob("*.py")
        for page in re.findall(r"docs/(\w+\.md)", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert [page for page in sorted(named) if not (ROOT / "docs" / page).is_file()] == []


def test_bash_completes_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "trainer.bash"
    script.write_text(capsys.readouterr().out)
    ask = 'COMP_WORDS=(trainer {words}); COMP_CWORD={last}; _shtab_trainer; echo "${{COMPREPLY[@]}}"'
    shown = []
    for words in ("ver", "chat --aga"):
        line = ask.format(words=words, last=len(words.split()))
        argv = ["bash", "-c", f"source {script}; {line}"]
        shown.append(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    assert shown == [["verify-resume"], ["--against"]]
