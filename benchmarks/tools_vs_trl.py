"""Time per GRPO step with a tool, ours and TRL's GRPOTrainer: same model, template, questions, tool and budget.

    python benchmarks/tools_vs_trl.py [--prompts 4] [--group 8] [--rounds 2] [--steps 2] [--warm-up 16]

Both alternate in one process. A short SFT warm-up makes SmolLM2 call the calculator, else there are no second turns.
Both train LoRA of rank 16 on all linear layers in bfloat16 at temperature 1, without KL penalty. Our tool runs in a
process per rollout, TRL in its own. CPU seconds include those of child processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from machine import conditions
from peft import LoraConfig
from step_times import StepTimes
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from datasets import Dataset
from trainer.config.load import load_recipe
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.next_prompt import PromptWriter
from trainer.data.sources import read_rows
from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.environments.pool import EnvironmentPool
from trainer.environments.tool_calls import same_turn
from trainer.model.policy import Reference, load_policy
from trainer.planning.plan import RFTPlan, make_plan
from trainer.rewards.builtin.last_number import last_number
from trainer.rewards.runner import RewardRunner
from trainer.run.directory import RunDir
from trainer.sampling.local import LocalSampler
from trainer.training import policy_update
from trainer.training.conversations import ConversationSampler
from trainer.training.group_sampler import Prompt
from trainer.training.learner import Learner
from trainer.training.open_groups import environment_settings
from trainer.training.rollouts import Rollouts, sampling_params, summarize

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
ROWS = ROOT / "datasets" / "calculator_rft_train.jsonl"
TOOL = ROOT / "recipes" / "environments" / "calculator.py"
SPEC = importlib.util.find_spec("trl")
assert SPEC is not None
assert SPEC.origin is not None
TEMPLATE = Path(SPEC.origin).parent / "chat_templates" / "qwen2_5.jinja"
"""One that both know; its tokens are in SmolLM2's vocabulary."""
CPU = torch.device("cpu")
TURN_TOKENS = 48
MAX_TURNS = 2
RESULT_TOKENS = 32
"""Room for the tool's result in TRL's budget, which counts it."""


def cpu_s() -> float:
    """CPU seconds of this process and its children, ended ones included."""
    me = psutil.Process()
    times = [me.cpu_times(), *(child.cpu_times() for child in me.children(recursive=True))]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return a * b


def is_right(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """`last_number` in TRL's form: on the last message."""
    return [
        last_number(str(completion[-1].get("content") or ""), {"answer": right})
        for completion, right in zip(completions, answer, strict=True)
    ]


def warmed_up(home: Path, steps: int) -> Path:
    """A copy of SmolLM2 that often calls the tool."""
    rows = (ROOT / "datasets" / "calculator_sft_train.jsonl").read_text().splitlines()
    calls = [row for row in rows if "tool_calls" in row]
    (home / "calls.jsonl").write_text("\n".join(calls) + "\n")
    recipe = {
        "name": "warm-up", "method": "sft", "model": {"path": str(MODEL), "chat_template": str(TEMPLATE)},
        "lora": {"rank": 16, "alpha": 32}, "data": {"train": "calls.jsonl", "max_seq_tokens": 512},
        "rows_per_step": 4, "steps": steps, "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "shape": "cpu",
    }  # fmt: skip
    (home / "warm-up.yaml").write_text(json.dumps(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (["trainer.worker", "warm-up.yaml"], ["trainer", "export", "warm-up", "--merge", "--out", "model"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return home / "model"


class Ours:
    """Our loop, writing no files except the journal."""

    name = "tunesmith"

    def __init__(self, arguments: argparse.Namespace, folder: Path, model: Path, stack: ExitStack) -> None:
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "name": "benchmark", "method": "rft", "steps": 1000,
                    "model": {"path": str(model), "chat_template": str(TEMPLATE)},
                    "data": {"train": str(ROWS), "max_seq_tokens": 512}, "rows_per_step": arguments.prompts,
                    "optimizer": {"learning_rate": 1e-5, "schedule": "constant"},
                    "rollout": {
                        "tools": [f"{TOOL}:multiply"], "max_turns": MAX_TURNS, "group_size": arguments.group,
                        "max_completion_tokens": TURN_TOKENS, "chunk_prompts": arguments.prompts,
                    },
                    "algorithm": {"name": "grpo", "kl_coef": 0.0},
                    "rewards": [{"use": "last_number"}],
                }
            )
        )  # fmt: skip
        plan = make_plan(load_recipe(recipe), "cpu")
        assert isinstance(plan, RFTPlan)
        self.plan = plan
        settings, rollout = plan.recipe.model, plan.recipe.rollout
        tokenizer = load_tokenizer(settings)
        encoder = ChatEncoder(tokenizer, settings, plan.recipe.data, for_prompts=True)
        prompts = [Prompt(row, ()) for row in read_rows(plan.recipe.data.train, plan.recipe.data)]
        self.world = World(0, 1, CPU)
        self.policy = load_policy(settings, plan.recipe.lora, 0, CPU)
        self.learner = Learner(self.policy, self.world)
        self.reference = Reference(self.policy, "initial", is_fresh=True)
        self.sampler = LocalSampler(self.policy, tokenizer)
        rewards = stack.enter_context(RewardRunner(plan.recipe.rewards, base_dir=folder))
        pool = stack.enter_context(EnvironmentPool(environment_settings(plan)))
        assert encoder.template is not None
        writer = PromptWriter(tokenizer, encoder.template, encoder.stop_ids, {}, same_turn)
        params = sampling_params(plan.recipe, rollout, encoder.stop_ids)
        groups = ConversationSampler(self.sampler, rewards, params, self.world, StopFlag(), pool, writer, plan)
        self.rollouts = Rollouts(plan, prompts, groups, RunDir(folder / "run"))
        self.step = 0

    def run(self, steps: int) -> list[dict[str, float]]:
        """What each step took."""
        found = []
        for _ in range(steps):
            wall, cpu = time.perf_counter(), cpu_s()
            self.sampler.publish(self.policy, self.step)
            drawn = self.rollouts.of_step(self.step)
            parts = policy_update.minibatches(drawn, self.plan, CPU)
            policy_update.learn(self.learner, parts, self.reference, self.plan, self.step)
            seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s() - cpu}
            values = summarize(drawn, self.world)
            tokens, turns = values["rollout/sampled_tokens"], values["rollout/turns"]
            found.append({**seconds, "tokens": tokens, "calls": turns - 1.0, "reward": values["rollout/reward"]})
            self.step += 1
        return found


class Trl:
    """TRL's trainer with its own sampling."""

    name = "TRL GRPOTrainer"

    def __init__(self, arguments: argparse.Namespace, folder: Path, model: Path) -> None:
        rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
        self.times = StepTimes()
        in_all = arguments.prompts * arguments.group
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
        self.trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            reward_funcs=is_right,
            args=GRPOConfig(
                output_dir=str(folder), report_to="none", use_cpu=True, bf16=True, max_steps=arguments.steps,
                per_device_train_batch_size=in_all, num_generations=arguments.group,
                max_completion_length=MAX_TURNS * TURN_TOKENS + RESULT_TOKENS,
                max_tool_calling_iterations=MAX_TURNS - 1,
                temperature=1.0, beta=0.0, learning_rate=1e-5, logging_steps=1, save_strategy="no", disable_tqdm=True,
                gradient_checkpointing=False,
            ),
            processing_class=tokenizer,
            tools=[multiply],
            train_dataset=Dataset.from_list([{"prompt": row["messages"], "answer": row["answer"]} for row in rows]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[self.times],
        )  # fmt: skip
        self.in_all = in_all

    def run(self, steps: int) -> list[dict[str, float]]:
        """What each step took; CPU seconds are shared out by wall seconds."""
        self.times.seconds.clear()
        cpu = cpu_s()
        self.trainer.train()
        cpu = cpu_s() - cpu
        logs = [entry for entry in self.trainer.state.log_history if "completions/mean_length" in entry][-steps:]
        return [
            {
                "wall_s": seconds,
                "cpu_s": cpu * seconds / sum(self.times.seconds),
                "tokens": entry["completions/mean_length"] * self.in_all,
                "calls": entry["tools/call_frequency"],
                "reward": entry["reward"],
            }
            for seconds, entry in zip(self.times.seconds, logs, strict=True)
        ]


def main() -> None:
    """Alternate, and write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=16)
    parser.add_argument("--out", default="benchmarks/results/tools_vs_trl")
    arguments = parser.parse_args()
    common.quiet()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        model = warmed_up(Path(name), arguments.warm_up)
        ours, theirs = Ours(arguments, Path(name), model, stack), Trl(arguments, Path(name), model)
        found: dict[str, list[dict[str, float]]] = {Ours.name: [], Trl.name: []}
        ours.run(1)
        theirs.run(arguments.steps)
        for number in range(arguments.rounds):
            for runner in [ours, theirs] if number % 2 == 0 else [theirs, ours]:
                found[runner.name] += runner.run(arguments.steps)
                print(f"{runner.name}: {found[runner.name][-1]}", flush=True)
    medians = {
        name: {key: statistics.median(step[key] for step in steps) for key in steps[0]} for name, steps in found.items()
    }
    env, load = conditions(), os.getloadavg()[0]
    ratios = {key: round(medians[Trl.name][key] / medians[Ours.name][key], 2) for key in ("wall_s", "cpu_s")}
    result = {"conditions": env, "load": load, "medians": medians, "ratios": ratios, "all": found}
    lines = [
        f"GRPO with LoRA and a calculator tool, SmolLM2-135M-Instruct after {arguments.warm_up} steps of SFT,",
        f"{arguments.prompts} questions x {arguments.group} rollouts, two turns of at most {TURN_TOKENS} tokens.",
        f"{env['processor']}, {env['threads']} threads, torch {env['torch']}, TRL {env['trl']}; {env['date']}; load "
        f"{load:.1f}. Medians of {arguments.rounds * arguments.steps} steps.\n",
        "| | wall s/step | CPU s/step | completion tokens | calls per rollout | reward |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {each['wall_s']:.1f} | {each['cpu_s']:.1f} | {each['tokens']:.0f} | {each['calls']:.2f} "
            f"| {each['reward']:.2f} |"
            for name, each in medians.items()
        ),
        f"\nRatio: **{ratios['cpu_s']}x** in CPU seconds per step, {ratios['wall_s']}x in wall seconds. TRL counts the",
        "tokens of the tool's results as completion tokens; we do not.",
    ]
    common.write_result(Path(arguments.out), result, lines)


if __name__ == "__main__":
    main()
