"""Trains tiny models of every family that transformers knows and compares with plain transformers; see docs/models.md.

Each family runs in a forked child with a time limit, so that a crash ends only its own row. Results are kept by family
in `build/model_matrix/` and used again while sources, versions and the family's configuration are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, Final

import matrix_configs
import matrix_measure
import peft
import torch
import transformers
from matrix_child import start, write_record
from matrix_verdict import METHODS, table, verdict

LIMIT_S: Final = 240
ROOT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = ROOT / "build" / "model_matrix"
VERSIONS: Final = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}


def main() -> int:
    """Measure the families asked for, write the table; 0 whatever the verdicts are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="FAMILY", help="these families, the page keeps its others; all when left out"
    )
    parser.add_argument("--jobs", type=int, default=1, help="families at the same time")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the cache")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where models.md and models.json go")
    arguments = parser.parse_args()
    known = sorted([*matrix_configs.families(), *matrix_configs.VARIANTS])
    chosen = arguments.only or known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"transformers {VERSIONS['transformers']} has no family {', '.join(unknown)}")
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = _sources_digest()
    records = _measured(chosen, sources, max(1, arguments.jobs), is_fresh=arguments.fresh)
    arguments.out.mkdir(parents=True, exist_ok=True)
    records += _kept(
        arguments.out / "models.json", {record["family"] for record in records} if arguments.only else None
    )
    (arguments.out / "models.md").write_text(table(records, VERSIONS), encoding="utf-8")
    verdicts = [
        {**record, "verdicts": {method: verdict(record, method) for method in METHODS}}
        for record in sorted(records, key=lambda each: str(each["family"]))
    ]
    lines = ",\n".join(json.dumps(record, sort_keys=True) for record in verdicts)  # a family a line: for diffs
    document = f'{{"versions": {json.dumps(VERSIONS)},\n"families": [\n{lines}\n]}}\n'
    (arguments.out / "models.json").write_text(document, encoding="utf-8")
    print(f"written: {arguments.out / 'models.md'}", file=sys.stderr)
    return 0


def _kept(file: Path, measured: set[str] | None) -> list[dict[str, Any]]:
    """What the page holds of other families, so that a few can be measured again; none of other versions.

    Args:
        file: the models.json of the page.
        measured: families that are new; None if all are, and nothing is kept.
    """
    if measured is None or not file.is_file():
        return []
    document = json.loads(file.read_text(encoding="utf-8"))
    if document["versions"] != VERSIONS:
        return []
    return [record for record in document["families"] if record["family"] not in measured]


def _measured(chosen: list[str], sources: str, jobs: int, *, is_fresh: bool) -> list[dict[str, Any]]:
    """The record of each family, from the cache or a child."""
    running: dict[int, tuple[str, float, Path]] = {}
    waiting = [name for name in chosen if is_fresh or _cached(name, sources) is None]
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            directory = Path(tempfile.mkdtemp(prefix="matrix-"))
            running[start(directory, partial(_measure, name, directory))] = (name, time.monotonic(), directory)
        time.sleep(0.1)
        for child, (name, begin, directory) in list(running.items()):
            is_late = time.monotonic() - begin > LIMIT_S
            if is_late:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if is_late else os.WNOHANG)
            if ended:
                del running[child]
                died = f"no result after {LIMIT_S} s" if is_late else f"the process died (status {status})"
                record = _collect(name, directory, died if is_late or status else None, time.monotonic() - begin)
                _cache_file(name).write_text(json.dumps({"key": _key(name, sources), **record}))
                shown = ", ".join(f"{method} {verdict(record, method)[0]}" for method in METHODS)
                print(f"{name}: {shown} ({record['seconds']:.0f} s, {len(waiting)} to go)", file=sys.stderr, flush=True)
    return [record for name in chosen if (record := _cached(name, sources)) is not None]


def _measure(name: str, directory: Path) -> None:
    """Build, train by each method, compare; the record is written after each part."""
    family, changes = matrix_configs.VARIANTS.get(name, (name, {}))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.chdir(directory)
    here = Path()  # so that no message holds the path
    record: dict[str, Any] = {"outcomes": {}, "numbers": {}, "errors": {}}
    try:
        matrix_measure.build(here, family, changes)
        matrix_measure.read_text(here, family)
    except Exception as error:  # a model's code may fail in any way
        traceback.print_exc()
        record["unbuilt"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
        write_record(directory, record)
        return
    for method in matrix_measure.METHODS:
        try:
            record["outcomes"][method] = matrix_measure.train(here, method)
        except Exception as error:  # as a worker's process would end
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0]
            record["outcomes"][method] = ("CRASH", f"{type(error).__name__}: {reason}"[:300])
        write_record(directory, record)
    matrix_measure.measure(here, family, record)
    write_record(directory, record)


def _collect(name: str, directory: Path, died: str | None, seconds: float) -> dict[str, Any]:
    file = directory / "record.json"
    record: dict[str, Any] = {"outcomes": {}, "numbers": {}, "errors": {}}
    if file.is_file():
        record = json.loads(file.read_text())
    if died is not None:
        record["died"] = died
    family = matrix_configs.VARIANTS.get(name, (name, {}))[0]
    shutil.copy(directory / "log.txt", CACHE / f"{name}.log")
    shutil.rmtree(directory)
    return {"family": name, "class": matrix_configs.families()[family], "seconds": round(seconds, 1), **record}


def _cache_file(name: str) -> Path:
    return CACHE / f"{name}.json"


def _cached(name: str, sources: str) -> dict[str, Any] | None:
    file = _cache_file(name)
    record = json.loads(file.read_text()) if file.is_file() else {}
    return record if record.pop("key", None) == _key(name, sources) else None


def _sources_digest() -> str:
    """Of everything that all results depend on."""
    digest = hashlib.sha256(json.dumps(VERSIONS, sort_keys=True).encode())
    for file in sorted([*(ROOT / "trainer").rglob("*.py"), Path(__file__).with_name("matrix_measure.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(name: str, sources: str) -> str:
    """The sources and the configuration that a record was measured with."""
    family, changes = matrix_configs.VARIANTS.get(name, (name, {}))
    try:
        config = matrix_configs.tiny_config(family, changes).to_json_string(use_diff=False)
    except Exception as error:  # the family's own checks, which may fail in any way
        config = str(error)
    return hashlib.sha256(f"{sources}\n{config}".encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
