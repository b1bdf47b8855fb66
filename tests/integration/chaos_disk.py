"""What is done to a run directory between two attempts: the rest of a power cut, and damage."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from project import Run


def damage(run: Run, state: Path) -> None:
    """Change an exponent in the largest tensor of the newest checkpoint: a file that can be read, and is wrong."""
    if not run.checkpoints():
        return
    shard = run.newest_checkpoint() / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    entries = [entry for entry in zip_entries(content) if entry[0].endswith(b"/data/0")]
    begins = [begin for _, begin in entries] + [len(content)]
    largest = max(range(len(entries)), key=lambda number: begins[number + 1] - begins[number])
    content[begins[largest] + 3] ^= 0x10  # of a little-endian float32
    shard.write_bytes(content)
    before = [-1, *run.checkpoints()][-2]
    with (state / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "damaged", "step": before}) + "\n")


def zip_entries(content: bytes | bytearray) -> Iterator[tuple[bytes, int]]:
    """Name and place of the data of each entry: a shard is one archive of torch.save after another."""
    begin = -1
    while (begin := content.find(b"PK\x03\x04", begin + 1)) >= 0:
        name_size, extra_size = struct.unpack_from("<HH", content, begin + 26)
        name = begin + 30
        yield bytes(content[name : name + name_size]), name + name_size + extra_size


def apply_cut(run: Path, state: Path, coin: random.Random) -> None:
    """Make the run directory again from what the disk had promised."""
    record = json.loads((state / "cut.json").read_text())
    promised, present = record["promised"], record["present"]
    shadows = [Path(record["shadow"]), Path(record["shadow"] + "-present")]
    is_torn = record["mode"] == "torn"

    def build(inode: str, target: Path) -> None:
        old, new = promised["entries"].get(inode, {}), present["entries"].get(inode, {})
        target.mkdir()
        for name in sorted(old.keys() | new.keys()):
            child = (new if is_torn and coin.random() < 0.5 else old).get(name)
            if child is None:
                continue
            if str(child) in promised["entries"] or str(child) in present["entries"]:
                build(str(child), target / name)
                continue
            size, longest = promised["sizes"].get(str(child), 0), present["sizes"].get(str(child), 0)
            if is_torn and longest > size:
                size = coin.randint(size, longest)
            source = next(place / str(child) for place in shadows if (place / str(child)).exists())
            (target / name).write_bytes(source.read_bytes()[:size])

    after = run.with_name(f"{run.name}.after")
    shutil.rmtree(after, ignore_errors=True)
    root = str(promised["root"])
    is_known = root in promised["entries"]
    if is_known:
        build(root, after)
    shutil.rmtree(run)
    if is_known:
        after.rename(run)
    (state / "cut.json").unlink()
    for place in shadows:
        shutil.rmtree(place)
