"""Compare an SFT step with its matrix products alone, and with the machine's peak.

    python benchmarks/step_limit.py [--threads 1] [--rounds 5]

SmolLM2-135M-Instruct, LoRA of rank 16, the first 11 rows of the quickstart as one micro-batch. Every matrix product of
a forward and backward pass is recorded with its shapes and strides, then all of them are run again on random numbers,
alternating with the step. Their operands are in the cache, so alone they are slightly faster than within
the step. Writes benchmarks/results/step_limit.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import common
import flops
import torch
from machine import conditions
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.recipe import DataSettings, DataSource, LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.model.policy import load_policy
from trainer.planning.model_facts import ModelFacts
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

MODEL: Final = "models/SmolLM2-135M-Instruct"
ROWS: Final = "datasets/extract_train.jsonl"
NUM_ROWS: Final = 11
CPU: Final = torch.device("cpu")
PRODUCTS: Final = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}


class Recorder(TorchDispatchMode):
    """Records every matrix product with the layout of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._like: dict[Any, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, tuple(self._stand_in(arg) for arg in args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _stand_in(self, value: Any) -> Any:
        """A tensor of random numbers with this layout; equal layouts share one."""
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self._like:
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            self._like[key] = empty.copy_(torch.randn(value.shape) * 0.01)
        return self._like[key]


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that a call takes."""
    begin = clock()
    call()
    return clock() - begin


def main() -> None:
    """Alternate, and write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/step_limit")
    arguments = parser.parse_args()
    common.quiet()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    env: dict[str, Any] = conditions()

    settings, data = ModelSettings(path=MODEL), DataSettings(train=DataSource(path=ROWS))
    encoder = ChatEncoder(load_tokenizer(settings), settings, data)
    rows = encoder.encode(read_rows(data.train, data, NUM_ROWS)).sequences
    batch = Batch.pack(rows, CPU)
    policy = load_policy(settings, LoraSettings(rank=16), 0, CPU)
    learner = Learner(policy, World(0, 1, CPU))
    adam = AdamParams.of(OptimizerSettings(), 1e-6)

    def step() -> None:
        learner.learn([batch], sft_loss, adam, denominator=float(batch.num_trained))

    step()
    with Recorder() as recorder:
        learner.forward_backward(batch, sft_loss)

    def products() -> None:
        for func, args, kwargs in recorder.calls:
            func(*args, **kwargs)

    products()
    pairs = [(seconds(step, clock), seconds(products, clock)) for _ in range(arguments.rounds)]
    step_s, products_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    facts = ModelFacts.from_config(policy.causal_lm.config.to_dict())
    assert facts is not None
    lengths = [len(row.token_ids) for row in rows]
    needed = flops.training_flops(facts, lengths, batch.num_trained, is_lora=True)
    peak = env["bf16_peak_gflops"] * 1e9
    result = {
        "conditions": env, "tokens": sum(lengths), "trained_tokens": batch.num_trained, "rounds": arguments.rounds,
        "step_s": step_s, "products_alone_s": products_s, "products": len(recorder.calls), "model_flops": needed,
        "of_products": products_s / step_s, "of_peak": needed / peak / step_s, "all": pairs,
    }  # fmt: skip
    lines = [
        f"An SFT step of {sum(lengths):,} tokens ({batch.num_trained:,} trained), SmolLM2-135M-Instruct, LoRA.",
        f"{env['processor']}, {env['threads']} thread(s), AMX {env['amx']}, load {env['load_average'][0]},",
        f"torch {env['torch']}; bf16 matrix peak {env['bf16_peak_gflops']} GFLOP/s; {env['date']}; medians of",
        f"{arguments.rounds} alternating rounds.\n",
        "| | seconds | share of the step |\n|---|---:|---:|",
        f"| the step | {step_s:.2f} | 100% |",
        f"| its {len(recorder.calls):,} matrix products alone | {products_s:.2f} | {products_s / step_s:.0%} |",
        f"| its model FLOPs at the machine's peak | {needed / peak:.2f} | {needed / peak / step_s:.0%} |",
    ]
    common.write_result(Path(arguments.out), result, lines)


if __name__ == "__main__":
    main()
