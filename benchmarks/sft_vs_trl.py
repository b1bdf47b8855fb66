"""Tokens/s of SFT, ours and TRL's SFTTrainer: same model, rows and steps, alternating in one process.

    python benchmarks/sft_vs_trl.py [--rounds 3] [--steps 3]

TRL runs with all settings that work here (padded with completion-only loss at two micro-batch sizes, and packed);
the ratio is to its best. Both train LoRA of rank 16 on all linear layers with bfloat16 weights and AdamW; ours
also keeps float32 masters. Tokens are those of the rows; padding is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from machine import conditions
from peft import LoraConfig
from sides import serve
from step_times import StepTimes
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from trainer.config.recipe import DataSettings, DataSource, LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.distributed.world import World
from trainer.model.batch import Batch, micro_batches
from trainer.model.policy import load_policy
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams

MODEL = "models/SmolLM2-135M-Instruct"
ROWS = "datasets/extract_train.jsonl"
ROWS_PER_STEP = 16
BUDGET = 1024
CPU = torch.device("cpu")


class Ours:
    """Our learner on the rows of a step."""

    name = "tunesmith"

    def __init__(self, steps: int) -> None:
        settings, data = ModelSettings(path=MODEL), DataSettings(train=DataSource(path=ROWS))
        encoder = ChatEncoder(load_tokenizer(settings), settings, data)
        rows = encoder.encode(read_rows(data.train, data, steps * ROWS_PER_STEP)).sequences
        self.steps = [rows[start : start + ROWS_PER_STEP] for start in range(0, len(rows), ROWS_PER_STEP)]
        self.tokens = [sum(len(row.token_ids) for row in step) for step in self.steps]
        self.adam = AdamParams.of(OptimizerSettings(), 2e-4)
        self.learner = Learner(load_policy(settings, LoraSettings(), 0, CPU), World(0, 1, CPU))

    def run(self) -> list[float]:
        """Seconds of each step."""
        seconds = []
        for rows in self.steps:
            begin = time.perf_counter()
            packs = [Batch.pack(group, CPU) for group in micro_batches(rows, BUDGET)]
            self.learner.learn(packs, sft_loss, self.adam, denominator=sum(sum(row.inputs.weights) for row in rows))
            seconds.append(time.perf_counter() - begin)
        return seconds


class Trl:
    """TRL's trainer on the same rows in the same order."""

    def __init__(self, name: str, steps: int, folder: str, **settings: Any) -> None:
        self.name, self.times = name, StepTimes()
        rows = [json.loads(line) for line in Path(ROWS).read_text().splitlines()[: steps * ROWS_PER_STEP]]
        packing = bool(settings.get("packing"))
        pairs = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        self.trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16),
            args=SFTConfig(
                output_dir=folder, report_to="none", use_cpu=True, bf16=True, max_steps=-1, num_train_epochs=1,
                learning_rate=2e-4, logging_steps=1000, save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
                gradient_checkpointing=False, max_length=BUDGET if packing else 512, dataloader_drop_last=False,
                **settings,
            ),
            processing_class=AutoTokenizer.from_pretrained(MODEL),
            train_dataset=Dataset.from_list(pairs),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[self.times],
        )  # fmt: skip

    def run(self) -> list[float]:
        """Seconds of each step."""
        self.times.seconds.clear()
        self.trainer.train()
        return list(self.times.seconds)


SETTINGS: dict[str, dict[str, Any]] = {
    "TRL padded, 16 rows": {"per_device_train_batch_size": 16},
    "TRL padded, 4 x 4 rows": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "TRL packed": {"per_device_train_batch_size": 1, "packing": True},
}


def main() -> None:
    """Alternate, and write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/sft_vs_trl")
    parser.add_argument("--serve", choices=["ours", "trl"], help="measure one side when told to; see sides.py")
    arguments = parser.parse_args()
    common.quiet()
    if arguments.serve is not None:
        serve_side(arguments)
        return
    ours = Ours(arguments.steps)
    rates: dict[str, list[float]] = {ours.name: []}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        theirs = trl_runners(arguments.steps, folder, failed)
        ours.run()
        for number in range(arguments.rounds):
            for runner in [ours, *theirs] if number % 2 == 0 else [*theirs, ours]:
                seconds = runner.run()
                rates.setdefault(runner.name, []).append(sum(ours.tokens) / sum(seconds))
                print(f"{runner.name}: {rates[runner.name][-1]:.0f} tokens/s", flush=True)
    report(Path(arguments.out), rates, failed, arguments)


def trl_runners(steps: int, folder: str, failed: dict[str, str]) -> list[Trl]:
    """TRL in each setting that runs here, run once; why the others do not run goes into `failed`, by name."""
    runners = []
    for name, settings in SETTINGS.items():
        try:
            runner = Trl(name, steps, folder, **settings)
            runner.run()
        except Exception as error:  # a setting that does not run here is reported, not hidden
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        else:
            runners.append(runner)
    return runners


def serve_side(arguments: argparse.Namespace) -> None:
    """Answer with tokens/s of one side, of TRL those of each setting that runs here; see sides.py."""
    ours = Ours(arguments.steps)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        runners: Sequence[Ours | Trl] = [ours]
        if arguments.serve == "trl":
            runners = trl_runners(arguments.steps, folder, failed)

        def measure() -> dict[str, Any]:
            return {runner.name: sum(ours.tokens) / sum(runner.run()) for runner in runners}

        serve({**conditions(), "did_not_run": failed}, measure)


def report(out: Path, rates: dict[str, list[float]], failed: dict[str, str], arguments: argparse.Namespace) -> None:
    """Write JSON and Markdown."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((name for name in medians if name != Ours.name), key=lambda name: medians[name])
    ratio = medians[Ours.name] / medians[best]
    result = {
        "conditions": conditions(), "model": "SmolLM2-135M-Instruct", "rows_per_step": ROWS_PER_STEP,
        "steps": arguments.steps, "rounds": arguments.rounds, "tokens_per_s": medians, "all": rates,
        "did_not_run": failed, "best_of_trl": best, "ratio": round(ratio, 2),
    }  # fmt: skip
    env = result["conditions"]
    lines = [
        f"LoRA SFT of SmolLM2-135M-Instruct, {ROWS_PER_STEP} rows a step, medians of {arguments.rounds} alternating",
        f"rounds of {arguments.steps} steps. {env['processor']}, {env['threads']} threads, AMX {env['amx']},",
        f"torch {env['torch']}, TRL {env['trl']}; bf16 matrix peak",
        f"{env['bf16_peak_gflops']} GFLOP/s; {env['date']}.\n",
        "| | tokens/s |\n|---|---:|",
        *(f"| {name} | {value:.0f} |" for name, value in medians.items()),
        f"\nRatio to TRL's best ({best}): **{ratio:.1f}x**",
        *(f"\n{name} did not run: {why}" for name, why in failed.items()),
    ]
    common.write_result(out, result, lines)


if __name__ == "__main__":
    main()
