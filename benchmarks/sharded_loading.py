"""Host memory of each rank while a sharded model is loaded: by all ranks at once, and in turn.

    python benchmarks/sharded_loading.py [--ranks 4] [--layers 16]

Builds a Llama of random bf16 weights. `own` is memory that only this rank has; `mapped` are pages of the files, which
the ranks share and the kernel may drop. The last column is the time until all ranks have their part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from trainer.distributed.leaving import exit_with

WAYS = ("at once", "in turn")
INTERVAL_S = 0.002


def main() -> None:
    """Measure both ways, alternating, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = _build(Path(folder), arguments.layers)
        print(f"{size:.0f} MiB of weights, {arguments.ranks} ranks; MiB per rank, load {os.getloadavg()[0]:.1f}")
        for _ in range(arguments.rounds):
            for way in WAYS:
                argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.ranks)]
                argv += [__file__, "--rank", folder, way]
                done = subprocess.run([sys.executable, *argv], check=True, capture_output=True, text=True)
                found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
                own, mapped, seconds = (max(each[name] for each in found) for name in ("own", "mapped", "seconds"))
                print(f"{way}: own {own:.0f}, mapped {mapped:.0f}, {seconds:.1f} s", flush=True)


def _build(folder: Path, layers: int) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=8, vocab_size=8192
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) * 2 / 2**20


def rank(folder: str, way: str) -> int:
    """Load this rank's part and print its peaks above the start."""
    from trainer.config.recipe import LoraSettings, ModelSettings
    from trainer.distributed.world import join_world, leave_world
    from trainer.model.policy import load_policy

    world = join_world("cpu", int(os.environ["WORLD_SIZE"]), num_shards=int(os.environ["WORLD_SIZE"]))
    assert world.mesh is not None
    before, peak = _resident(), {"RssAnon": 0.0, "RssFile": 0.0}

    def watch() -> None:
        while True:
            for name, value in _resident().items():
                peak[name] = max(peak[name], value)
            time.sleep(INTERVAL_S)

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    with world.in_turn() if way == "in turn" else nullcontext():
        policy = load_policy(ModelSettings(path=folder), LoraSettings(rank=4), 0, torch.device("cpu"))
        policy.shard(world.mesh, world.device)
    world.barrier()
    seconds = time.perf_counter() - start
    found = {"own": peak["RssAnon"] - before["RssAnon"], "mapped": peak["RssFile"] - before["RssFile"]}
    for turn in range(world.size):
        if turn == world.rank:
            print(json.dumps(found | {"seconds": seconds}), flush=True)
        world.barrier()
    leave_world(world)
    return 0


def _resident() -> dict[str, float]:
    """Resident memory in MiB, private and mapped."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


if __name__ == "__main__":
    if "--rank" in sys.argv:
        exit_with(lambda: rank(*sys.argv[2:4]))
    main()
