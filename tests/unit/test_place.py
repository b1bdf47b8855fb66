"""Where a run's relative paths start after its project was moved or copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_recipe import RFT, write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.jobs.state import JobRecord, project_place, write_record
from trainer.planning.plan import make_plan
from trainer.run.directory import RunDir
from trainer.run.find import open_run
from trainer.run.place import Place, place_of, plan_from_here, settle


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a run whose recipe names a file by an absolute path."""
    old = tmp_path / "old"
    old.mkdir()
    monkeypatch.chdir(old)
    recipe = RFT.replace("  - use: last_number", f"  - use: mine.py:score\n    args: {{words: {old}/words.txt}}")
    (old / "mine.py").write_text("def score(completion, row, words):\n    return 0.0\n")
    run = open_run(make_plan(load_recipe(write_small(Path(), recipe))))
    write_record(run, JobRecord("local", str(old), 1.0))
    return old


def test_run_where_it_was_made(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in (RunDir(Path("runs/small")), RunDir(project / "runs/small")):
        assert place_of(run, str(project)) == Place(project)
        assert project_place(run) == Place(project)
    monkeypatch.chdir("/")
    run, _ = settle(RunDir(project / "runs/small"))
    assert (Path.cwd(), run.root) == (project, project / "runs/small")


def test_runs_behind_a_symbolic_link(project: Path, tmp_path: Path) -> None:
    shutil.move("runs", tmp_path / "scratch")
    Path("runs").symlink_to(tmp_path / "scratch")
    for root in (Path("runs/small"), tmp_path / "scratch/small"):
        assert place_of(RunDir(root), str(project)) == Place(project)


@pytest.mark.parametrize("is_copy", [False, True])
def test_moved_or_copied_project(
    project: Path, is_copy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = project.with_name("new")
    (shutil.copytree if is_copy else shutil.move)(project, new)
    monkeypatch.chdir(new)
    run, plan = settle(RunDir(Path("runs/small")))
    assert run.root == Path("runs/small")
    assert project_place(run) == Place(new, project, is_copy=is_copy)
    assert plan.recipe.model.path == "model"
    assert (plan.working_dir, plan.recipe_dir) == (str(new), str(new))
    assert plan.identity == run.read_plan().identity
    assert f'"words":"{new}/words.txt"' in plan.model_dump_json()
    what = "a copy of the run in" if is_copy else "moved from"
    assert capsys.readouterr().err == f"note: runs/small is {what} {project}; its paths now start in {new}\n"


def test_renamed_run_stays_in_its_project(project: Path) -> None:
    shutil.copytree("runs/small", "runs/other")
    assert project_place(RunDir(Path("runs/other"))) == Place(project)


def test_status_works_in_a_copy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(project, project.with_name("new"))
    monkeypatch.chdir(project.with_name("new"))
    assert main(["status", "small"]) == 0


@pytest.mark.parametrize("is_copy", [False, True])
def test_plan_from_here_names_the_files_beside_the_run(
    project: Path, is_copy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = project.with_name("new")
    (shutil.copytree if is_copy else shutil.move)(project, new)
    monkeypatch.chdir("/")
    recipe = plan_from_here(RunDir(new / "runs/small")).recipe
    assert Path.cwd() == Path("/")
    assert recipe.model.path == str(new / "model")
    assert recipe.data.train.path == str(new / "train.jsonl")


def test_plan_from_here_keeps_relative_paths_in_its_project_and_hub_names(project: Path, monkeypatch) -> None:
    run = RunDir(Path("runs/small"))
    assert plan_from_here(run) == run.read_plan()
    monkeypatch.chdir("/")
    shutil.rmtree(project / "model")  # as the name of a model on the hub, which is no directory here
    assert plan_from_here(RunDir(project / "runs/small")).recipe.model.path == "model"
