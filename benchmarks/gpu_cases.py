"""The cases of benchmarks/gpu.py: each knows its tokens and FLOPs and makes one step."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from flops import forward_flops, sampling_flops, training_flops
from random_models import (
    allocated_gib,
    model_facts,
    model_sizes,
    one_device,
    predicted_memory,
    random_policy,
    word_tokenizer,
)

from trainer.config.load import load_recipe
from trainer.config.recipe import LoraSettings, OptimizerSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.model.policy import Reference
from trainer.planning.plan import RFTPlan, make_plan
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.training import policy_update
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.rollouts import StepRollouts, with_advantages
from trainer.training.schedule import AdamParams
from trainer.types import Group, Rollout, Row

RATE = 1e-6
"""Learning rate: random weights have nothing to learn."""


@dataclass(frozen=True)
class Scale:
    """How large the cases are."""

    model: str
    pack_tokens: int
    """Tokens of an SFT step: one pack."""
    rows: int
    """Rows of an SFT step."""
    prompts: int
    group: int
    prompt_tokens: tuple[int, int]
    """Shortest and longest."""
    completion_tokens: tuple[int, int]
    drawn: int
    """Tokens of each sampled completion."""
    steps: int
    """Steps of a round; sampling makes one."""
    rounds: int
    micro_batch_tokens: int


FULL = Scale("Qwen2.5-1.5B", 4096, 8, 8, 8, (128, 256), (128, 512), 256, 10, 5, 8_192)
QUICK = Scale("Qwen2.5-1.5B", 4096, 8, 8, 8, (128, 256), (128, 512), 64, 3, 3, 8_192)
TINY = Scale("tiny", 128, 4, 2, 4, (6, 12), (4, 16), 8, 1, 1, 128)


class Case(Protocol):
    """What gpu.py measures."""

    name: str
    tokens: int
    """Tokens of a step, as counted in the rate."""
    flops: float
    """Model FLOPs of a step."""
    predicted_gib: float | None
    """Upper bound for torch's allocator, by the trainer's estimate."""
    steps: int
    """Steps of a round."""

    def step(self) -> None:
        """Make one step."""


def row_lengths(total: int, rows: int, seed: int) -> list[int]:
    """Unequal lengths of `rows` rows with sum `total`; the longest is about three times the shortest."""
    draw = random.Random(seed)
    shares = [draw.uniform(1.0, 3.0) for _ in range(rows)]
    lengths = [max(2, math.floor(total * share / sum(shares))) for share in shares]
    lengths[-1] += total - sum(lengths)
    return lengths


def sft_rows(scale: Scale, seed: int) -> list[TokenSequence]:
    """Rows of a step: random tokens, all but the first quarter trained."""
    vocab, draw = model_facts(scale.model).vocab, random.Random(seed)
    rows = []
    for length in row_lengths(scale.pack_tokens, scale.rows, seed):
        untrained = max(1, length // 4)
        trained = (False,) * untrained + (True,) * (length - untrained)
        tokens = tuple(draw.randrange(3, vocab) for _ in range(length))
        rows.append(TokenSequence(tokens, trained, TokenInputs(weights=(1.0,) * (length - untrained))))
    return rows


class Sft:
    """One pack, one update."""

    def __init__(self, scale: Scale, device: torch.device, *, is_lora: bool) -> None:
        self.name = f"SFT {'LoRA' if is_lora else 'full'} {scale.model}"
        self.device, lora = device, LoraSettings() if is_lora else None
        self.rows = sft_rows(scale, 0)
        self.tokens, self.steps = scale.pack_tokens, scale.steps
        self.num_trained = sum(row.num_trained for row in self.rows)
        lengths = [len(row.token_ids) for row in self.rows]
        self.flops = training_flops(model_facts(scale.model), lengths, self.num_trained, is_lora=is_lora)
        self.predicted_gib: float | None = allocated_gib(predicted_memory(scale.model, device, lora, scale.pack_tokens))
        policy = random_policy(scale.model, device, lora)
        self.learner = Learner(policy, World(0, 1, device))
        self.adam = AdamParams.of(OptimizerSettings(), RATE)

    def step(self) -> None:
        """Pack, learn, update."""
        pack = Batch.pack(self.rows, self.device)
        self.learner.learn([pack], sft_loss, self.adam, denominator=float(self.num_trained))


class Rft:
    """Reference pass and update on fixed groups, without sampling and rewards."""

    def __init__(self, scale: Scale, device: torch.device, folder: Path) -> None:
        self.name = f"RFT learn {scale.model}"
        self.device, facts = device, model_facts(scale.model)
        self.plan = _rft_plan(scale, device, folder)
        groups = _written_groups(scale, facts.vocab)
        self.drawn = StepRollouts(groups, tuple(range(len(groups))), groups, 0)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        scored = sum(rollout.num_drawn for rollout in rollouts)
        self.tokens, self.steps = sum(lengths), scale.steps
        computed = [part for group in groups for part in _computed_once(group)]
        self.flops = forward_flops(facts, computed, scored) + training_flops(facts, computed, scored, is_lora=True)
        memory = self.plan.memory
        assert memory is not None
        self.predicted_gib: float | None = memory.weights_gib + memory.state_gib + memory.phases["learning"]
        policy = random_policy(scale.model, device, self.plan.recipe.lora)
        self.learner = Learner(policy, World(0, 1, device))
        self.reference = Reference(policy, "initial", is_fresh=True)

    def step(self) -> None:
        """Pack, score the reference, learn, update."""
        parts = policy_update.minibatches(self.drawn, self.plan, self.device)
        policy_update.learn(self.learner, parts, self.reference, self.plan, 0)


def _computed_once(group: Group) -> list[int]:
    """Tokens of the prompt, stored once per pack, and of each completion."""
    drawn = [rollout.num_drawn for rollout in group.rollouts]
    return [len(group.rollouts[0].token_ids) - drawn[0], *drawn]


class Sampling:
    """The local sampler with an adapter, every completion at full length."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.name = f"sampling {scale.model}"
        facts = model_facts(scale.model)
        draw = random.Random(0)
        prompts = [_random_tokens(draw, draw.randint(*scale.prompt_tokens), facts.vocab) for _ in range(scale.prompts)]
        self.requests = [SampleRequest(prompt, row, scale.group) for row, prompt in enumerate(prompts)]
        self.params = SamplingParams(scale.drawn, frozenset(), 0, 0)
        self.tokens = scale.prompts * scale.group * scale.drawn
        self.flops = sampling_flops(facts, [len(prompt) for prompt in prompts], scale.group, scale.drawn)
        self.predicted_gib: float | None = None
        self.steps = 1  # hundreds of forward passes
        self.policy = random_policy(scale.model, device, LoraSettings())
        self.sampler = LocalSampler(self.policy, word_tokenizer(facts.vocab))

    def step(self) -> None:
        """Publish the adapter and sample a chunk."""
        self.sampler.publish(self.policy, 0)
        self.sampler.sample(self.requests, self.params)


def _rft_plan(scale: Scale, device: torch.device, folder: Path) -> RFTPlan:
    """A plan as `trainer train` makes it, on one device."""
    longest = scale.prompt_tokens[1] + scale.completion_tokens[1]
    shape = one_device(device, scale.micro_batch_tokens)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(model_sizes(scale.model)))
    rows = [{"prompt": f"row {number}", "answer": "1"} for number in range(scale.prompts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "one.yaml").write_text(shape.model_dump_json())
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "name": "benchmark", "method": "rft", "model": {"path": str(folder / "model")}, "steps": 1000,
                "data": {"train": str(folder / "rows.jsonl"), "max_seq_tokens": longest},
                "rows_per_step": scale.prompts, "algorithm": {"name": "grpo", "kl_coef": 0.02},
                "rollout": {
                    "group_size": scale.group, "max_completion_tokens": scale.completion_tokens[1],
                    "max_sampler_kl": 1e9,
                },
                "rewards": [{"use": "last_number"}], "optimizer": {"learning_rate": RATE},
            }
        )
    )  # fmt: skip
    plan = make_plan(load_recipe(recipe), str(folder / "one.yaml"))
    assert isinstance(plan, RFTPlan)
    return plan


def _written_groups(scale: Scale, vocab: int) -> tuple[Group, ...]:
    """Groups of unequal completions with unequal rewards."""
    draw = random.Random(1)
    logprob = -math.log(vocab)
    groups = []
    for number in range(scale.prompts):
        prompt = _random_tokens(draw, draw.randint(*scale.prompt_tokens), vocab)
        rollouts = []
        for sample in range(scale.group):
            drawn = _random_tokens(draw, draw.randint(*scale.completion_tokens), vocab)
            rollouts.append(
                Rollout(
                    token_ids=prompt + drawn,
                    loss_mask=(False,) * len(prompt) + (True,) * len(drawn),
                    sampler_logprobs=(logprob,) * len(drawn),
                    finish_reason="stop",
                    policy_version=0,
                    text="",
                    reward=float(sample % 2),
                )
            )
        group = Group(Row({}, "benchmark", number + 1, number), tuple(rollouts))
        groups.append(with_advantages(group, "group_std"))
    return tuple(groups)


def _random_tokens(draw: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(draw.randrange(3, vocab) for _ in range(count))


class TrlSft:
    """TRL's SFTTrainer on the rows of an SFT step, repeated for all steps of a run."""

    def __init__(
        self, kind: str, case: Sft, scale: Scale, device: torch.device, folder: Path, *, is_lora: bool
    ) -> None:
        from peft import LoraConfig
        from random_models import random_causal_lm
        from step_times import StepTimes
        from trl import SFTConfig, SFTTrainer

        from datasets import Dataset

        self.name, self.times = f"TRL {kind}", StepTimes()
        model = random_causal_lm(scale.model, device, attn="sdpa")
        if not is_lora:
            model.requires_grad_(True)
        settings: dict[str, Any] = {"packed": {"packing": True}, "padded": {}}[kind]
        self.trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(folder), report_to="none", use_cpu=device.type == "cpu", bf16=True, num_train_epochs=1,
                learning_rate=RATE, logging_steps=1000, save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
                gradient_checkpointing=False, max_length=scale.pack_tokens,
                per_device_train_batch_size=1 if kind == "packed" else scale.rows, **settings,
            ),
            processing_class=word_tokenizer(model_facts(scale.model).vocab),
            train_dataset=Dataset.from_list(_labelled(case.rows) * scale.steps),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if is_lora
            else None,
            callbacks=[self.times],
        )  # fmt: skip

    def run(self) -> float:
        """Seconds of all optimizer steps of a run."""
        self.times.seconds.clear()
        self.trainer.train()
        return sum(self.times.seconds)


def _labelled(rows: Sequence[TokenSequence]) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": list(row.token_ids),
            "labels": [
                token if is_trained else -100 for token, is_trained in zip(row.token_ids, row.loss_mask, strict=True)
            ],
        }
        for row in rows
    ]
