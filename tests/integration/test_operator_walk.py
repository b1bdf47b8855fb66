"""The commands of docs/accounts.md as they stand, and an operator's day: key, quota hit, audit, deploy, sleep, wake."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from project import BIN, Project, wait_for
from serving import serving

pytestmark = pytest.mark.heavy
PAGE = Path(__file__).parents[2] / "docs" / "accounts.md"


def test_the_commands_of_the_page_run_as_they_stand(project: Project) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    words = ["bash", "-eux", "-c", "".join(blocks)]
    done = subprocess.run(words, cwd=project.root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (project.root / "audit.jsonl").read_text().splitlines()]
    # one entry for each of the four limits
    assert [each["action"] for each in entries] == ["account.create", "keys.create", *["quota.set"] * 4]


def test_an_operators_day(project: Project) -> None:
    def trainer(*words: str) -> str:
        done = project.trainer(*words)
        assert done.code == 0, done.said
        return done.stdout

    with serving(project, "--deployments") as server:
        trainer("account", "create", "team")
        key = trainer("keys", "create", "team", "--expires", "1d").strip()
        words = ("--max-replica-count", "2", "--scale-to-zero-window", "3s", "--account", "team")
        trainer("deploy", "create", "sums", "--model", "model", "--deployment-shape", "cpu_float32", *words)

        def replicas() -> tuple[str, int]:
            (about,) = json.loads(trainer("deploy", "list", "--json"))
            return about["state"], sum(each["is_ready"] for each in about["status"].get("replicas", []))

        def ask() -> httpx.Response:
            body: dict[str, Any] = {
                "model": "sums",
                "messages": [{"role": "user", "content": "8 and 90?"}],
                "max_tokens": 3,
            }
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=240)

        wait_for(lambda: replicas() == ("DEPLOYED", 0), server.running)  # was made, and sleeps
        woken = ask()
        assert (woken.status_code, "load;dur=" in woken.headers["server-timing"]) == (200, True)
        trainer("quota", "set", "team", "requests_per_minute=1")
        wait_for(lambda: ask().status_code == 429)  # a server reads limits every 2 s
        answer = ask()
        assert answer.json()["error"]["code"] == "requests_per_minute"
        wait_for(lambda: replicas() == ("DEPLOYED", 0), server.running)
        trainer("keys", "revoke", key.split("_")[1])
        wait_for(lambda: ask().status_code == 401)
        assert '"model": "sums"' in trainer("usage", "team", "--by", "model", "--json")
        trainer("deploy", "delete", "sums")
        wait_for(lambda: "state: DELETED" in trainer("deploy", "get", "sums"))
        assert int(trainer("audit", "verify").split(":")[0]) == 8
        listed = trainer("audit", "list")
        for action in ("deploy.create", "deploy.delete", "quota.set", "keys.revoke"):
            assert action in listed
