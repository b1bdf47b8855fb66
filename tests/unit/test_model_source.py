"""What a name on the command line means where it names nothing on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import LaunchError
from trainer.inference.source import find_source


@pytest.mark.parametrize("target", ["/nope", "./nope", "nope", "runs/nope", "models/nope", "~/nope", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match=f"^{target}: no run, no adapter"):
        find_source(target)


def test_owner_and_name_are_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("owner/name").model.path == "owner/name"
