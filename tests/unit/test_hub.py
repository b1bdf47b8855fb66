"""Hub models in a plan: their commit and config.json, from the cache or by two small requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, fake_hub
from small_recipe import SFT, SIZES, write_small

from trainer.config.load import load_recipe
from trainer.planning.hub import HubModel, cached_model, hub_model
from trainer.planning.plan import make_plan


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub(json.dumps(SIZES).encode()) as serving:
        yield serving


def of_model(hub: FakeHub) -> list[str]:
    """Requests for a model's files; huggingface_hub may ask for other things, depending on its surroundings."""
    return [request for request in hub.requests if " /owner/" in request]


def recipe_of(name: str = "owner/model", revision: str = "main") -> Path:
    return write_small(Path(), SFT.replace("path: model", f"path: {name}\n  revision: {revision}"))


def checked(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "trainer", "check", "recipe.yaml", "--json", *arguments]
    return subprocess.run(
        argv, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_branch_is_resolved_to_its_commit_with_one_probe_and_one_download(hub, tmp_path):
    recipe_of()
    done = checked(hub.environment(str(tmp_path / "hf")), "--shape", "auto")
    report = report_of(done)
    assert done.stderr == ""
    assert report["values"]["model.revision"] == {
        "value": COMMIT,
        "origin": "commit of `main` when the plan was made",
    }
    assert report["model"]["params"] == 28_832
    assert [request.split()[0] for request in of_model(hub)].count("GET") == 1
    assert all(request.endswith("/config.json") for request in of_model(hub))


def test_the_second_time_the_hub_is_not_asked(hub, tmp_path):
    recipe_of()
    first = report_of(checked(hub.environment(str(tmp_path / "hf"))))
    hub.requests.clear()
    second = report_of(checked(hub.environment(str(tmp_path / "hf"))))
    assert of_model(hub) == []
    assert second["identity"] == first["identity"]
    plan = make_plan(load_recipe(Path("recipe.yaml")))  # without a network, too
    assert plan.identity_hash == first["identity"]
    assert plan.recipe.model.revision == COMMIT


def test_the_plan_of_a_branch_is_that_of_its_commit(hub, tmp_path):
    recipe_of()
    environment = hub.environment(str(tmp_path / "hf"))
    by_branch = report_of(checked(environment))
    by_commit = report_of(checked(environment, "--set", f"model.revision={COMMIT}"))
    assert by_branch["identity"] == by_commit["identity"]
    assert by_commit["values"]["model.revision"]["origin"] == "--set"


def test_the_sizes_of_a_pinned_commit_are_fetched(hub, tmp_path):
    recipe_of(revision=COMMIT)
    assert report_of(checked(hub.environment(str(tmp_path / "hf"))))["model"]["params"] == 28_832


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("owner/gated", "main", "recipe.yaml:4: model.path: owner/gated (revision main): the hub gives no access."),
        ("owner/gone", "main", "recipe.yaml:4: model.path: owner/gone (revision main): the hub has no such model"),
        ("owner/model", "v2", "recipe.yaml:4: model.path: owner/model (revision v2): the hub has no such revision."),
    ],
)
def test_what_the_hub_refuses_is_refused_with_its_line(hub, tmp_path, name, revision, message):
    recipe_of(name, revision)
    done = checked(hub.environment(str(tmp_path / "hf")))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert len(of_model(hub)) == 1


def test_a_hub_that_cannot_be_reached_leaves_the_branch_with_a_warning(tmp_path):
    recipe_of()
    with fake_hub(b"") as stopped:
        environment = stopped.environment(str(tmp_path / "hf"))
    done = checked(environment)  # nothing listens on the port any more
    assert report_of(done)["values"]["model.revision"]["value"] == "main"
    first, second = done.stderr.splitlines()
    assert first.startswith(
        "warning: recipe.yaml:5: model.revision: `main` is a branch or a tag, which can change; pin a commit "
        "(40 hexadecimal digits). It was not resolved to one, since the hub cannot be reached (ConnectError: "
    )
    assert second.endswith("owner/model: the sizes of the model are unknown, so it was not checked that it fits cpu")


def test_offline_mode_asks_nobody():
    assert hub_model("owner/model", "main") == HubModel(None, None, "HF_HUB_OFFLINE is set")
    recipe_of()
    branch, _ = make_plan(load_recipe(Path("recipe.yaml"))).warnings
    assert branch.endswith("It was not resolved to one, since HF_HUB_OFFLINE is set.")


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_downloaded_model_is_read_from_the_cache(tmp_path, revision):
    root = tmp_path / "hf" / "hub" / "models--owner--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    assert cached_model("owner/model", revision) == HubModel(COMMIT, None)
    config = root / "snapshots" / COMMIT / "config.json"
    config.write_text(json.dumps(SIZES))
    assert hub_model("owner/model", revision) == HubModel(COMMIT, config)
