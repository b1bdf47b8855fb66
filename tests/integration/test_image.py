"""The Dockerfile is built by buildah, on a base image that the tests are given, and its command answers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = "TUNESMITH_BASE_IMAGE"
"""Directory with a root file system that stands for python:3.11-slim-bookworm; a registry is not needed then."""
VOLUMES = "TUNESMITH_BUILD_VOLUMES"
"""`HOST:CONTAINER` pairs, separated by spaces: pip's configuration, wheels and certificates of this machine."""

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed: apt-get install buildah"),
    pytest.mark.skipif(os.environ.get(BASE) is None, reason=f"{BASE} names no root file system"),
]


def buildah(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    place = ["--root", str(store / "root"), "--runroot", str(store / "run"), "--storage-driver", "vfs"]
    return subprocess.run(["buildah", *place, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_image_is_built_and_its_command_answers(tmp_path: Path) -> None:
    base = buildah(tmp_path, "from", "--name", "base", "scratch")
    assert base.returncode == 0, base.stderr
    mounted = buildah(tmp_path, "mount", "base").stdout.strip()
    subprocess.run(["cp", "-a", f"{os.environ[BASE]}/.", mounted], check=True)
    tag = "docker.io/library/python:3.11-slim-bookworm"
    for step in (["umount", "base"], ["commit", "base", tag]):
        done = buildah(tmp_path, *step)
        assert done.returncode == 0, done.stderr
    volumes = [part for pair in os.environ.get(VOLUMES, "").split() for part in ("--volume", pair)]
    how = ["--isolation", "chroot", "--network", "host", "--pull-never", *volumes]
    built = buildah(tmp_path, "bud", *how, "-t", "tunesmith", ".")
    assert built.returncode == 0, built.stderr[-4000:]
    assert buildah(tmp_path, "from", "--name", "here", "localhost/tunesmith").returncode == 0
    asked = buildah(tmp_path, "run", "--isolation", "chroot", "here", "--", "trainer", "--version")
    assert asked.stdout.startswith("tunesmith "), asked.stderr
    user = buildah(tmp_path, "run", "--isolation", "chroot", "here", "--", "sh", "-c", "id -u; echo $HOME")
    assert user.stdout.split() == ["1000", "/home/trainer"]
