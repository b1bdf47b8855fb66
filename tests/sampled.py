"""Tiny policies with a local sampler, prompts, and the policy's own logprobs of what was drawn."""

from __future__ import annotations

import torch
from tiny import tiny_tokenizer

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import SamplingParams

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gpt_oss"]
STOP_IDS = frozenset({2, 50, 60, 70, 80, 90, 100, 110})
"""Many, so that rows end at many different lengths."""
PARAMS = SamplingParams(max_completion_tokens=24, stop_ids=STOP_IDS, seed=1, step=2)


def tiny_policy(path, lora: LoraSettings | None = None) -> Policy:
    policy = load_policy(ModelSettings(path=str(path), compute_dtype="float32"), lora, 0, CPU)
    if lora is not None:
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.trained_parameters().values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return policy


def published(policy: Policy, version: int = 0) -> LocalSampler:
    sampler = LocalSampler(policy, tiny_tokenizer())
    sampler.publish(policy, version)
    return sampler


def prompt(number: int) -> tuple[int, ...]:
    return tuple(range(3 + number, 3 + number + (5, 17, 30, 9, 17, 2, 21)[number]))


def scored(policy: Policy, asked, groups, temperature: float) -> torch.Tensor:
    sequences = [
        TokenSequence(
            request.prompt_ids + completion.token_ids,
            (False,) * len(request.prompt_ids) + (True,) * len(completion.token_ids),
        )
        for request, group in zip(asked, groups, strict=True)
        for completion in group
    ]
    with torch.no_grad():
        return policy(Batch.pack(sequences, CPU), temperature=temperature).logprobs


def logprobs_of(groups) -> torch.Tensor:
    return torch.tensor([value for group in groups for completion in group for value in completion.logprobs])
