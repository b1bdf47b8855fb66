"""`trainer export` of finished and unfinished runs, read back by other programs."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import Done, Project

from trainer.run.directory import RunDir
from trainer.run.state import Outcome


@pytest.fixture(scope="module")
def lora(shared: Project) -> Done:
    """An adapter, six steps, with checkpoints at steps 4 and 6."""
    return shared.trainer("train", "recipe.yaml", "--name", "lora")


@pytest.fixture(scope="module")
def full(shared: Project) -> Done:
    """A model of which every parameter was trained, in bfloat16."""
    changes = {"lora": None, "model": {"path": "model"}, "optimizer__learning_rate": 1e-3}
    return shared.trainer("train", shared.recipe("full.yaml", name="full", **changes))


@pytest.fixture(scope="module")
def stopped(shared: Project, lora: Done) -> Iterator[Path]:
    """The first run, as if it had failed after step 5."""
    assert lora.code == 0, lora.said
    run = RunDir(shared.root / "runs" / "lora")
    finished = run.read_outcome()
    assert finished is not None
    run.write_outcome(Outcome("failed", 5, "a crash", 1))
    yield run.root
    run.write_outcome(finished)


def test_the_newest_checkpoint_exports_the_same_adapter_as_the_end_of_training(shared: Project, lora: Done) -> None:
    done = shared.trainer("export", "lora", "--checkpoint", "6", "--out", "six")
    assert done.code == 0, lora.said + done.said
    assert "checkpoint, step 6" in done.stderr
    assert "verified on 4 held-out rows" in done.stderr
    trained = shared.root / "runs" / "lora" / "adapter" / "adapter_model.safetensors"
    assert (shared.root / "six" / "adapter_model.safetensors").read_bytes() == trained.read_bytes()


def test_the_newest_checkpoint_exports_the_same_full_model_as_the_end_of_training(shared: Project, full: Done) -> None:
    done = shared.trainer("export", "full", "--checkpoint", "6", "--out", "full-six")
    assert done.code == 0, full.said + done.said
    trained = shared.root / "runs" / "full" / "model" / "model.safetensors"
    assert (shared.root / "full-six" / "model.safetensors").read_bytes() == trained.read_bytes()


def test_a_run_that_did_not_finish_exports_its_newest_checkpoint(shared: Project, stopped: Path) -> None:
    (stopped / "checkpoints" / "step-000006").rename(stopped / "away")
    try:
        done = shared.trainer("export", "lora", "--out", "unfinished")
    finally:
        (stopped / "away").rename(stopped / "checkpoints" / "step-000006")
    assert done.code == 0, done.said
    assert "checkpoint, step 4" in done.stderr
    assert (shared.root / "unfinished" / "adapter_model.safetensors").is_file()


def test_a_copied_project_exports_its_own_base(shared: Project, lora: Done, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shared.root, copy)
    config = json.loads((copy / "model/config.json").read_text())
    (copy / "model/config.json").write_text(json.dumps(config | {"name_of_this_copy": "copy"}))
    done = shared.trainer("export", str(copy / "runs/lora"), "--merge", "--out", "of-copy")
    assert done.code == 0, lora.said + done.said
    assert f"is a copy of the run in {shared.root}" in done.stderr
    assert json.loads((shared.root / "of-copy/config.json").read_text())["name_of_this_copy"] == "copy"


def test_a_checkpoint_that_does_not_exist_is_refused_with_those_that_do(shared: Project, lora: Done) -> None:
    done = shared.trainer("export", "lora", "--checkpoint", "3", "--out", "three")
    assert done.code == 2, lora.said + done.said
    assert "has no checkpoint of step 3; there are: 4, 6." in done.stderr
    assert not (shared.root / "three").exists()


def test_a_damaged_checkpoint_is_refused(shared: Project, lora: Done) -> None:
    file = next((shared.root / "runs" / "lora" / "checkpoints" / "step-000004").glob("*.distcp"))
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    done = shared.trainer("export", "lora", "--checkpoint", "4", "--out", "four")
    file.write_bytes(intact)
    assert done.code == 1, lora.said + done.said
    assert f"{file.name}: damaged" in done.stderr


def test_exported_files_are_as_readable_as_the_umask_allows(shared: Project, lora: Done) -> None:
    done = shared.trainer("export", "lora", "--merge", "--out", "readable")
    assert done.code == 0, lora.said + done.said
    plain = shared.root / "plain"
    plain.touch()
    modes = {file.stat().st_mode for file in (shared.root / "readable").iterdir()}
    assert modes == {plain.stat().st_mode}
    assert (shared.root / "runs" / "lora" / "adapter" / "adapter_model.safetensors").stat().st_mode == modes.pop()


def test_a_merged_model_and_an_adapter_are_written_as_gguf(shared: Project, lora: Done) -> None:
    merged = shared.trainer("export", "lora", "--merge", "--gguf", "f16", "--ollama")
    adapter = shared.trainer("export", "lora", "--gguf", "bf16", "--out", "adapter-gguf")
    assert (merged.code, adapter.code) == (0, 0), lora.said + merged.said + adapter.said
    assert merged.stdout == "runs/lora/gguf\n"
    assert "GGUF read back on 4 held-out rows: logits within" in merged.stderr
    assert "GGUF read back on 4 held-out rows: logits" in adapter.stderr
    whole, part = shared.root / "runs/lora/gguf/lora-f16.gguf", shared.root / "adapter-gguf/lora-bf16.gguf"
    assert "FROM ./lora-f16.gguf\n" in (whole.parent / "Modelfile").read_text()
    assert 0 < part.stat().st_size < whole.stat().st_size


def test_the_model_card_says_what_was_trained_on_what_with_which_result(shared: Project, lora: Done) -> None:
    done = shared.trainer("export", "lora", "--best", "--intended-use", "Adding numbers.", "--out", "card")
    assert done.code == 0, lora.said + done.said
    card = (shared.root / "card" / "README.md").read_text()
    header, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(header)["library_name"] == "peft"
    assert "LoRA adapters of rank 4; best weights, step" in body
    assert "## Intended use\n\nAdding numbers.\n" in body
    for name in ("train.jsonl", "eval.jsonl"):
        digest = hashlib.sha256((shared.root / name).read_bytes()).hexdigest()
        assert f"`{name}`" in body
        assert f"`sha256:{digest}`" in body
    records = shared.run("lora").metrics()
    assert f"| `eval/loss` | {records[0]['eval/loss']:.4g} (step 0) |" in body
    recipe = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["optimizer"] == {"learning_rate": 0.01}
    assert "logging" not in recipe


class Hub(ThreadingHTTPServer):
    """The part of a model hub that an upload uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(BaseHTTPRequestHandler):
    """Answers as the hub does; files are kept in the server."""

    server: Hub

    def do_GET(self) -> None:
        is_right = self.headers["Authorization"] == "Bearer right"
        self._answer({"name": "me"} if is_right else {"error": "Invalid credentials"}, 200 if is_right else 401)

    def do_POST(self) -> None:
        content = self._body()
        if self.path == "/api/repos/create":
            self.server.created = json.loads(content)
            self._answer({"url": f"{self.server.address}/me/tiny"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(content)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/me/tiny/commit/{'a' * 40}"
            self._answer({"success": True, "commitOid": "a" * 40, "commitUrl": url})
        else:
            self._answer({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, values: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(project: Project, hub: Hub, token: str) -> Done:
    argv = [sys.executable, "-m", "trainer.commands.cli", "export", "lora", "--push", "me/tiny", "--out", "pushed"]
    environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return project.start(argv, environment).wait()


def test_push_uploads_the_export_with_its_card_to_a_private_repository(shared: Project, lora: Done, hub: Hub) -> None:
    done = push(shared, hub, "right")
    assert done.code == 0, lora.said + done.said
    assert done.stdout == f"pushed\n{hub.address}/me/tiny/commit/{'a' * 40}\n"
    assert hub.created["name"] == "tiny"
    assert hub.created["organization"] == "me"
    assert hub.created["visibility"] == "private"
    files = {file.name: file.read_bytes() for file in (shared.root / "pushed").iterdir()}
    assert hub.files == files
    assert b"## Intended use" in files["README.md"]


def test_a_refused_token_is_reported_before_anything_is_exported(shared: Project, lora: Done, hub: Hub) -> None:
    done = push(shared, hub, "wrong")
    assert done.code == 2, lora.said + done.said
    assert f"--push me/tiny: {hub.address} refuses the token" in done.stderr
    assert "verified" not in done.stderr
    assert hub.files == {}


def test_without_held_out_rows_the_verification_says_that_it_used_training_rows(shared: Project) -> None:
    file = shared.recipe("no_eval.yaml", name="no_eval", data__eval=None, eval_interval=0, steps=2)
    trained = shared.trainer("train", file)
    done = shared.trainer("export", "no_eval")
    assert done.code == 0, trained.said + done.said
    assert "verified on 4 training rows" in done.stderr
    assert json.loads((shared.root / "runs" / "no_eval" / "export" / "adapter_config.json").read_text())["r"] == 4
