"""Measure tokenizing a million generated rows: time, memory, disk, the second start, and the rows of a step.

    python benchmarks/million_rows.py [--rows 1000000] [--keep DIR]

SmolLM2-135M-Instruct's tokenizer and template, chats of about 70 tokens. Memory is the sum over all processes, where
pages that several share count once (PSS), sampled twice a second. Writes benchmarks/results/million_rows.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
import psutil
from machine import conditions

from trainer.config.recipe import DataSettings, DataSource, ModelSettings
from trainer.data.order import MAX_SHUFFLED, rows_of_step

MODEL = "models/SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results"
ROWS_PER_STEP = 64
NUM_STEPS = 200
ITEMS = ("a green umbrella", "two tickets to Lyon", "blue running shoes", "a desk lamp", "the annual report")
NAMES = ("Anna", "Bo", "Chidi", "Dara", "Emil", "Fatima", "Goran", "Hana")
PHASES = ("tokenize", "again", "steps")


def write_rows(file: Path, num_rows: int) -> None:
    """Write chats of 30 to 100 tokens."""
    generator = random.Random(0)
    with file.open("w", encoding="utf-8") as opened:
        for number in range(num_rows):
            name, item = generator.choice(NAMES), generator.choice(ITEMS)
            place = " ".join(generator.choice(("north", "old", "market", "river", "gate")) for _ in range(number % 7))
            question = f"Order {number}: {name} wants {item}, delivered to {generator.randrange(400)} {place} street."
            answer = json.dumps({"order": number, "name": name, "item": item, "place": place})
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            opened.write(json.dumps({"messages": messages}) + "\n")


class MemoryPeak:
    """Largest memory of a process and its descendants, and of the process alone, in MiB."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.total = self.main = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            sizes = []
            try:
                for process in (self.process, *self.process.children(recursive=True)):
                    sizes.append(process.memory_full_info().pss / 2**20)
            except psutil.Error:  # one of them has just ended
                continue
            self.main, self.total = max(self.main, sizes[0]), max(self.total, sum(sizes))


def phase(name: str, root: Path) -> dict[str, Any]:
    """One phase of the measurement, in a process of its own."""
    import numpy as np

    from trainer.data.chat import ChatEncoder, load_tokenizer
    from trainer.data.token_cache import RowRequest, tokenize_rows
    from trainer.data.token_table import TokenTable

    common.quiet()
    source = DataSource(path=str(root / "rows.jsonl"))
    model = ModelSettings(path=MODEL)
    begin = time.perf_counter()
    encoder = ChatEncoder(load_tokenizer(model), model, DataSettings(train=source))
    encoder_s = time.perf_counter() - begin
    begin = time.perf_counter()
    begin_cpu = time.process_time()
    states = list(tokenize_rows(RowRequest(root / ".tokens", encoder, source)))
    directory = states[-1].directory
    assert directory is not None
    table = TokenTable(directory)
    result: dict[str, Any] = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
    result |= {"encoder_seconds": encoder_s, "counts": vars(table.counts)}
    result["disk_bytes"] = sum(file.stat().st_size for file in directory.iterdir())
    if name == "steps":
        begin = time.perf_counter()
        total = 0
        for step in range(NUM_STEPS):
            chosen = table.sequences_of(rows_of_step(0, step, ROWS_PER_STEP, table.num_rows))
            total += sum(int(np.sum(table.sequence(number).token_ids)) for number in chosen)
        result |= {"seconds_of_a_step": (time.perf_counter() - begin) / NUM_STEPS, "checksum": total}
    return result


def measured(name: str, root: Path) -> dict[str, Any]:
    """Run a phase and watch its memory."""
    argv = [sys.executable, __file__, "--phase", name, "--keep", str(root)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    with MemoryPeak(psutil.Process(process.pid)) as peak:
        out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"phase {name} failed")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result | {"peak_mib": peak.total, "peak_main_mib": peak.main}


def order_cost(num_rows: int) -> float:
    """Seconds that the choice of a step's rows takes, the first of an epoch left out."""
    rows_of_step(0, 0, ROWS_PER_STEP, num_rows)
    begin = time.perf_counter()
    for step in range(1, 51):
        rows_of_step(0, step, ROWS_PER_STEP, num_rows)
    return (time.perf_counter() - begin) / 50


def table_lines(result: dict[str, Any]) -> list[str]:
    """The result as Markdown."""
    counts = result["tokenize"]["counts"]
    tokens = counts["num_tokens"]
    lines = [
        f"# {counts['num_read']:,} rows, {tokens:,} tokens",
        "",
        f"Measured on {result['conditions']['processor']}, {result['processors']} processors; load average before it",
        f"began: {result['conditions']['load_average'][0]}. Imports are not counted. Memory is of all processes, in",
        "brackets of the one that trains; pages of mapped files count, which the system takes back when it needs them.",
        "",
        "| phase | seconds | CPU seconds of the process that trains | peak memory, MiB |",
        "|---|---:|---:|---:|",
    ]
    titles = {
        "tokenize": "first start: read, tokenize, write",
        "again": "second start: digest of the rows, map",
        "steps": f"second start and the rows of {NUM_STEPS} steps of {ROWS_PER_STEP}",
    }
    for name in PHASES:
        each = result[name]
        memory = f"{each['peak_mib']:,.0f} ({each['peak_main_mib']:,.0f})"
        lines.append(f"| {titles[name]} | {each['seconds']:.1f} | {each['cpu_seconds']:.1f} | {memory} |")
    lines += ["", f"- {counts['num_read'] / result['tokenize']['seconds']:,.0f} rows a second"]
    lines += [f"- {result['tokenize']['disk_bytes'] / tokens:.2f} bytes a token on disk"]
    lines += [f"- tokenizer and template, at every start: {result['again']['encoder_seconds']:.1f} s"]
    lines += [f"- rows of a step read from disk: {1000 * result['steps']['seconds_of_a_step']:.1f} ms"]
    for num_rows, seconds in result["order_seconds"].items():
        lines.append(f"- choice of {ROWS_PER_STEP} rows among {int(num_rows):,}: {1000 * seconds:.2f} ms")
    return lines


def main() -> None:
    """Measure, or run one phase for the process that measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="a directory for the rows; a temporary one when left out")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase is not None:
        print(json.dumps(phase(arguments.phase, arguments.keep)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        root.mkdir(exist_ok=True)
        write_rows(root / "rows.jsonl", arguments.rows)
        result: dict[str, Any] = {"conditions": conditions(), "processors": len(os.sched_getaffinity(0))}
        result |= {name: measured(name, root) for name in PHASES}
    sizes = (1000, MAX_SHUFFLED, 1_000_000, 100_000_000)
    result["order_seconds"] = {num_rows: order_cost(num_rows) for num_rows in sizes}
    common.write_result(RESULTS / "million_rows", result, table_lines(result))


if __name__ == "__main__":
    main()
