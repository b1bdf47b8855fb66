"""`import trainer`: the public names, loaded lazily and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trainer

PUBLIC = ["Job", "Outcome", "Row", "Score", "reconnect_and_wait", "submit"]


def loaded(code: str) -> set[str]:
    """The modules that are loaded after some code, in a process of its own."""
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_is_loaded_without_torch():
    code = f"import trainer\nfrom trainer import {', '.join(PUBLIC)}\nassert trainer.submit is submit"
    modules = loaded(code)
    assert {"trainer.jobs", "trainer.types", "trainer.rewards.contract"} <= modules
    assert not {"torch", "transformers", "accelerate", "peft", "trl"} & modules


def test_import_alone_loads_nothing():
    assert {name for name in loaded("import trainer") if name.startswith("trainer")} == {"trainer"}


def test_help_loads_neither_rich_nor_pydantic():
    code = "from trainer.commands.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass"
    assert not {"rich", "pydantic", "yaml"} & loaded(code)


def test_public_names_are_declared():
    assert trainer.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(trainer))
    assert trainer.Outcome is trainer.jobs.Outcome


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'sumbit'"):
        trainer.sumbit  # noqa: B018
