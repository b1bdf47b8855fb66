"""Seconds per RFT step, ours and TRL's GRPOTrainer: same model, prompts, group size and completion budget.

    python benchmarks/rft_vs_trl.py [--prompts 4] [--group 8] [--tokens 64] [--trl-rows 0] [--rounds 2] [--steps 2]

Both alternate in one process. Both train LoRA of rank 16 on all linear layers in bfloat16 at temperature 1, score the
reference (beta / kl_coef above 0), and reward completions by a trivial function of the text. Completions
are random, so both seconds per step and completion tokens per second are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from machine import conditions
from peft import LoraConfig
from sides import serve
from step_times import StepTimes
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from datasets import Dataset
from trainer.config.load import load_recipe
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.sources import read_rows
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.model.policy import Reference, load_policy
from trainer.planning.plan import RFTPlan, make_plan
from trainer.rewards.runner import RewardRunner
from trainer.run.directory import RunDir
from trainer.sampling.local import LocalSampler
from trainer.training import policy_update
from trainer.training.group_sampler import GroupSampler, Prompt
from trainer.training.learner import Learner
from trainer.training.rollouts import Rollouts, sampling_params, summarize

MODEL = "models/SmolLM2-135M-Instruct"
ROWS = "datasets/sums_train.jsonl"
KL_COEF = 0.02
CPU = torch.device("cpu")


def digit_share(completion: str, row: Any) -> float:
    """A reward that is cheap and differs within a group."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def trl_digit_share(completions: list[Any], **_: Any) -> list[float]:
    """The same in TRL's form."""
    return [digit_share(completion[0]["content"], None) for completion in completions]


class Ours:
    """Our loop, writing no files except the journal."""

    name = "tunesmith"

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "name": "benchmark", "method": "rft", "model": {"path": MODEL}, "steps": 1000,
                    "data": {"train": ROWS, "max_seq_tokens": 512}, "rows_per_step": arguments.prompts,
                    "rollout": {"group_size": arguments.group, "max_completion_tokens": arguments.tokens},
                    "algorithm": {"name": "grpo", "kl_coef": KL_COEF},
                    "rewards": [{"use": f"{Path(__file__).resolve()}:digit_share"}],
                }
            )
        )  # fmt: skip
        plan = make_plan(load_recipe(recipe), "cpu")
        assert isinstance(plan, RFTPlan)
        self.plan = plan
        settings, rollout = self.plan.recipe.model, self.plan.recipe.rollout
        tokenizer = load_tokenizer(settings)
        encoder = ChatEncoder(tokenizer, settings, self.plan.recipe.data, for_prompts=True)
        rows = read_rows(self.plan.recipe.data.train, self.plan.recipe.data)
        prompts = [Prompt(row, encoder.encode_prompt(row)) for row in rows]
        self.world = World(0, 1, CPU)
        self.policy = load_policy(settings, self.plan.recipe.lora, 0, CPU)
        self.learner = Learner(self.policy, self.world)
        self.reference = Reference(self.policy, "initial", is_fresh=True)
        self.sampler = LocalSampler(self.policy, tokenizer)
        self.rewards = RewardRunner(self.plan.recipe.rewards, base_dir=folder).__enter__()
        params = sampling_params(self.plan.recipe, rollout, encoder.stop_ids)
        group_sampler = GroupSampler(self.sampler, self.rewards, params, self.world, StopFlag())
        self.rollouts = Rollouts(self.plan, prompts, group_sampler, RunDir(folder / "run"))
        self.step = 0

    def run(self, steps: int) -> list[tuple[float, float]]:
        """(seconds, completion tokens) of each step."""
        found = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.sampler.publish(self.policy, self.step)
            drawn = self.rollouts.of_step(self.step)
            parts = policy_update.minibatches(drawn, self.plan, CPU)
            policy_update.learn(self.learner, parts, self.reference, self.plan, self.step)
            found.append((time.perf_counter() - begin, summarize(drawn, self.world)["rollout/sampled_tokens"]))
            self.step += 1
        return found


class Trl:
    """TRL's trainer with its own sampling."""

    name = "TRL GRPOTrainer"

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        rows = [json.loads(line) for line in Path(ROWS).read_text().splitlines()[:256]]
        self.times, self.arguments = StepTimes(), arguments
        in_all = arguments.prompts * arguments.group
        at_once = arguments.trl_rows or in_all
        self.trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16),
            reward_funcs=trl_digit_share,
            args=GRPOConfig(
                output_dir=str(folder), report_to="none", use_cpu=True, bf16=True, max_steps=arguments.steps,
                per_device_train_batch_size=at_once, gradient_accumulation_steps=in_all // at_once,
                num_generations=arguments.group,
                max_completion_length=arguments.tokens, temperature=1.0, beta=KL_COEF, learning_rate=1e-5,
                logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            ),
            processing_class=AutoTokenizer.from_pretrained(MODEL, padding_side="left"),
            train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[self.times],
        )  # fmt: skip

    def run(self, steps: int) -> list[tuple[float, float]]:
        """(seconds, completion tokens) of each step."""
        self.times.seconds.clear()
        self.trainer.train()
        batch = self.arguments.prompts * self.arguments.group
        logs = [entry for entry in self.trainer.state.log_history if "completions/mean_length" in entry][-steps:]
        return list(zip(self.times.seconds, [entry["completions/mean_length"] * batch for entry in logs], strict=True))


def serve_side(arguments: argparse.Namespace) -> None:
    """Answer with seconds and completion tokens of each step of one side; see sides.py."""
    with tempfile.TemporaryDirectory() as name:
        runner = (Ours if arguments.serve == "ours" else Trl)(arguments, Path(name))
        try:
            serve(conditions(), lambda: {"steps": runner.run(arguments.steps)})
        finally:
            if isinstance(runner, Ours):
                runner.rewards.close()


def main() -> None:
    """Alternate, and write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trl-rows", type=int, default=0, help="completions that TRL learns from at once; 0: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/rft_vs_trl")
    parser.add_argument("--serve", choices=["ours", "trl"], help="measure one side when told to; see sides.py")
    arguments = parser.parse_args()
    common.quiet()
    if arguments.serve is not None:
        serve_side(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = Ours(arguments, Path(name)), Trl(arguments, Path(name))
        found: dict[str, list[tuple[float, float]]] = {Ours.name: [], Trl.name: []}
        ours.run(1)
        theirs.run(1)
        for number in range(arguments.rounds):
            for runner in [ours, theirs] if number % 2 == 0 else [theirs, ours]:
                found[runner.name] += runner.run(arguments.steps)
                print(f"{runner.name}: {found[runner.name][-1]}", flush=True)
        ours.rewards.close()
    seconds = {name: statistics.median(second for second, _ in steps) for name, steps in found.items()}
    rates = {
        name: sum(tokens for _, tokens in steps) / sum(second for second, _ in steps) for name, steps in found.items()
    }
    env = conditions()
    result = {
        "conditions": env, "prompts": arguments.prompts, "group": arguments.group, "tokens": arguments.tokens,
        "seconds_per_step": seconds, "completion_tokens_per_s": rates, "all": found,
        "ratio_seconds": round(seconds[Trl.name] / seconds[Ours.name], 2),
        "ratio_tokens_per_s": round(rates[Ours.name] / rates[Trl.name], 2),
    }  # fmt: skip
    lines = [
        f"GRPO with LoRA, SmolLM2-135M-Instruct, {arguments.prompts} prompts x {arguments.group} answers x at most",
        f"{arguments.tokens} tokens, reference scored. {env['processor']}, {env['threads']} threads,",
        f"AMX {env['amx']}, torch {env['torch']}, TRL {env['trl']}, which learns from",
        f"{arguments.trl_rows or arguments.prompts * arguments.group} completions at once; {env['date']}.\n",
        "| | s/step | completion tokens/s |\n|---|---:|---:|",
        *(f"| {name} | {seconds[name]:.1f} | {rates[name]:.0f} |" for name in found),
        f"\nRatio: **{result['ratio_seconds']}x** in seconds per step, {result['ratio_tokens_per_s']}x in tokens/s",
    ]
    common.write_result(Path(arguments.out), result, lines)


if __name__ == "__main__":
    main()
