"""manifest.json and complete.json: one parser, and the bytes that earlier versions have written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from trainer.checkpoints.manifest import FileDigest, Inventory, Manifest

MANIFEST = """{
 "format": 1,
 "step": 20,
 "counters": {
  "updates": 40
 },
 "world_size": 2,
 "identity_hash": "abc",
 "files": {
  ".metadata": {
   "bytes": 3,
   "sha256": "d1"
  },
  "__0_0.distcp": {
   "bytes": 1048,
   "sha256": "d2"
  }
 }
}"""
MARKER = """{
 "format": 1,
 "step": 20,
 "identity_hash": "abc",
 "files": {
  "run/metrics.jsonl": {
   "bytes": 7,
   "sha256": "d3"
  }
 }
}"""


def test_manifest_is_read_and_written_as_earlier_versions_did() -> None:
    files = {".metadata": FileDigest(3, "d1"), "__0_0.distcp": FileDigest(1048, "d2")}
    manifest = Manifest(Inventory(20, "abc", files), {"updates": 40}, 2)
    assert Manifest.parse(MANIFEST) == manifest
    assert manifest.dump() == MANIFEST


def test_marker_is_read_and_written_as_earlier_versions_did() -> None:
    marker = Inventory(20, "abc", {"run/metrics.jsonl": FileDigest(7, "d3")})
    assert Inventory.parse(MARKER.encode()) == marker
    assert marker.dump() == MARKER


@pytest.mark.parametrize("missing", ["step", "counters", "world_size", "identity_hash", "files"])
def test_a_manifest_without_a_field_is_refused(missing: str) -> None:
    document = {name: value for name, value in json.loads(MANIFEST).items() if name != missing}
    with pytest.raises(ValueError, match="KeyError"):
        Manifest.parse(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (MARKER[:60], "JSONDecodeError"),  # cut off
        (b'{"\xff": 1}', "UnicodeDecodeError"),
        ("[]", "a JSON list"),
        (MARKER.replace('"bytes": 7', '"bytes": "many"'), "ValueError"),
        (MARKER.replace('"sha256"', '"md5"'), "KeyError"),
        ('{"step": 20, "identity_hash": "abc", "files": ["x"]}', "AttributeError"),
        ('{"step": null, "identity_hash": "abc", "files": {}}', "TypeError"),
    ],
)
def test_a_damaged_marker_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Inventory.parse(text)


def test_a_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    assert FileDigest.of(tmp_path / "file") == FileDigest(3000, hashlib.sha256(b"abc" * 1000).hexdigest())
