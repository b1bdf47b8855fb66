"""`trainer account`, `keys`, `quota`, `usage` and `audit` on a store of their own."""

from __future__ import annotations

import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from trainer.commands.cli import _parser, main
from trainer.control.keys import KEY
from trainer.control.store import Store
from trainer.control.usage import Used, add_usage


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_STORE", raising=False)
    return tmp_path


class Said:
    """Runs commands and returns what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        found = main(list(words))
        shown = self._capsys.readouterr()
        assert found == code, shown.err
        return shown.out if code == 0 else shown.err


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


def test_an_account_gets_keys_that_are_listed_rotated_and_revoked(said: Said, directory: Path) -> None:
    said("account", "create", "team")
    key = said("keys", "create", "team", "--expires", "90d", "--note", "laptop").strip()
    assert KEY.fullmatch(key)
    new = said("keys", "rotate", key.split("_")[1]).strip()
    said("keys", "revoke", new.split("_")[1])
    listed = json.loads(said("keys", "list", "team", "--json"))
    assert [(each["id"], each["scopes"], each["problem"], each["note"]) for each in listed] == [
        (each.split("_")[1], ["inference"], "the key is revoked", "laptop") for each in (key, new)
    ]
    table = said("keys", "list")
    assert not any(each.rpartition("_")[2] in table for each in (key, new))
    said("account", "disable", "team")
    assert json.loads(said("account", "list", "--json"))[0]["is_disabled"] is True
    assert (directory / "runs" / ".control" / "store.sqlite").exists()


def test_quotas_and_use_are_shown_together(said: Said, directory: Path) -> None:
    said("account", "create", "team")
    said("quota", "set", "team", "credit=+2.5", "replicas=3", "concurrent_requests=4")
    said("quota", "set", "team", "replicas=")
    said("quota", "set", "team", "tokens_per_minute=100", "--model", "m")
    add_usage(
        Store("sqlite:///runs/.control/store.sqlite"),
        [Used("2026-11-26", "team", "m", "a", 2, 30, 4, 1_500_000, 0, 10**9)],
    )
    assert json.loads(said("quota", "get", "team", "--json")) == [
        {"limit": "concurrent_requests", "model": "*", "value": "4", "used": None},
        {"limit": "credit", "model": "*", "value": "2.5", "used": "1"},
        {"limit": "tokens_per_minute", "model": "m", "value": "100", "used": None},
    ]
    lines = said("usage", "team", "--by", "account,model,addon,day").splitlines()
    assert lines[1].split() == ["team", "m", "a", "2026-11-26", "2", "30", "4", "1.5", "0.0", "1"]


def test_the_audit_log_is_listed_exported_verified_and_pruned(said: Said, directory: Path) -> None:
    for name in ("one", "two"):
        said("account", "create", name)
    head = said("audit", "verify").strip()
    assert head.startswith("2:")
    said("account", "create", "three")
    assert said("audit", "verify", "--contains", head).startswith("3:")
    said("audit", "export", "--out", "audit.jsonl")
    exported = [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]
    assert [each["target"] for each in exported] == ["one", "two", "three"]
    assert exported[0]["actor"].startswith("cli ")
    assert len(said("audit", "list", "--last", "1").splitlines()) == 2
    said("audit", "prune", "--keep", "0s")
    assert said("audit", "verify").startswith("4:")
    assert "does not contain 3:" in said("audit", "verify", "--contains", f"3:{'0' * 64}", code=1)


def test_mistakes_say_what_to_change(said: Said) -> None:
    said("account", "create", "team")
    for words, message in (
        (("keys", "create", "nobody"), "no account 'nobody'; `trainer account create nobody` makes it"),
        (("keys", "create", "team", "--scope", "root"), "scopes root: there are inference, training, admin, metrics"),
        (("keys", "create", "team", "--expires", "soon"), "--expires soon: write a duration as 90s, 5m, 12h or 30d"),
        (("quota", "set", "team", "credit"), "credit: write LIMIT=VALUE"),
        (("usage", "--by", "colour"), "usage by colour: there are day, account, model, addon"),
        (("account", "list", "--store", "mysql://a"), "the store is SQLite or PostgreSQL"),
    ):
        assert message in said(*words, code=2)


def test_deployments_are_asked_for_and_shown(said: Said) -> None:
    said("account", "create", "admin")
    shown = said("deploy", "create", "orders", "--model", "my_run", "--max-replica-count", "3", "--max-wait", "5m")
    assert shown.splitlines()[:3] == ["name: orders", "state: CREATING", "replicas: 0 (0 to 3)"]
    said("deploy", "scale", "orders", "--min-replica-count", "1", "--scale-to-zero-window", "90s")
    (listed,) = json.loads(said("deploy", "list", "--json"))
    spec = listed["spec"]
    assert (spec["min_replicas"], spec["max_replicas"], spec["scale_to_zero_s"], spec["max_wait_s"]) == (1, 3, 90, 300)
    assert "change 3 is not carried out yet" in said("deploy", "update", "orders", "--model", "my_run_2")
    assert "state: DELETING" in said("deploy", "delete", "orders")
    for words, message in (
        (("get", "other"), "no deployment 'other'; `trainer deploy list` lists them"),
        (("scale", "orders"), "say what to change"),
        (("create", "b", "--model", "m", "--deployment-shape", "h100x1"), "it does not start vllm on cuda"),
        (("create", "b", "--model", "m", "--deployment-shape", "h100x1_fp8", "--enable-addons"), "takes no addons"),
        (("create", "b", "--model", "m", "--print", "k8s"), "--print k8s needs --image"),
    ):
        assert message in said("deploy", *words, code=2)


def test_manifests_are_valid_say_that_they_are_untested_and_ask_for_nothing(said: Said, directory: Path) -> None:
    words = ["--model", "my_run", "--deployment-shape", "h100x1", "--region", "eu", "--max-replica-count", "4"]
    printed = said("deploy", "create", "orders", *words, "--print", "k8s", "--image", "registry/me:1")
    assert printed.startswith("# Untested")
    documents = list(yaml.safe_load_all(printed))
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
    pod = documents[0]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"topology.kubernetes.io/region": "eu"}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert main_parses(container["command"][1:])
    scaler = documents[2]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 4)
    printed = said("deploy", "create", "orders", *words, "--print", "sky", "--setup", "pip install it")
    task = yaml.safe_load(printed)
    assert task["resources"] == {"ports": 8000, "accelerators": "H100:1", "region": "eu"}
    assert main_parses(task["run"].split()[1:])
    assert not (directory / "runs").exists()


def main_parses(words: list[str]) -> bool:
    """Whether the command line knows a command."""
    return _parser()[0].parse_args(words).with_accounts is True
