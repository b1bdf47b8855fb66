"""States that one training server saved, in the hands of others: exported, served, continued by another server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project
from raw_training import OPEN, RawClient, step_data
from serving import serving

from trainer.api.service import open_service

pytestmark = pytest.mark.heavy
OPTIONS = ("--training", "--training-dtype", "float32", "--kv-cache-tokens", "8192", "--served-name", "model")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def test_a_state_is_exported_served_and_continued_by_another_server(shared: Project, tmp_path: Path) -> None:
    whole = open_service(shared.root / "model", compute_dtype="float32").create(rank=4, seed=1)
    losses = []
    for step in range(6):
        losses.append(whole.forward_backward(step_data(step), "cross_entropy").metrics["loss:sum"])
        whole.optim_step(1e-2, epsilon=1e-8)
    with serving(shared, "model", "--training-dir", "first", *OPTIONS) as server:
        client = RawClient(server.url).open()
        model = client.create()
        assert [model.train(step) for step in range(3)] == losses[:3]
        path = client.result(model.post("save_weights", path="three"))["path"]
    command = [sys.executable, "-m", "trainer", "export", f"first#{path}", "--merge", "--out", str(tmp_path / "merged")]
    done = subprocess.run(command, cwd=shared.root, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "verified on 3 held-out texts" in done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    place = Path("models") / model.name.replace(":", ".")
    for part in ("model.json", "weights/three"):
        source, target = (shared.root / root / place / part for root in ("first", "second"))
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    adapter = ("--adapter", f"mine=first#{path}")
    with serving(shared, "model", *adapter, "--training-dir", "second", *OPTIONS) as server:
        client = RawClient(server.url).open()
        again = client.create_from(path)
        assert [again.train(step) for step in range(3, 6)] == losses[3:]
        with server.client() as chats:
            answer = chats.completions.create(model="mine", prompt=[5, 6, 7], max_tokens=4, temperature=0, logprobs=1)
            base = chats.completions.create(model="model", prompt=[5, 6, 7], max_tokens=4, temperature=0, logprobs=1)
        found = [each.choices[0].logprobs for each in (answer, base)]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0].token_logprobs != found[1].token_logprobs, "the adapter answers, not the base"
