"""Samplers: token ids in, completions with logprobs out."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from trainer.config.rft_sections import RolloutSettings
from trainer.distributed.world import World
from trainer.model.policy import Policy
from trainer.sampling.sampler import Sampler


def make_sampler(
    settings: RolloutSettings, policy: Policy, tokenizer: PreTrainedTokenizerBase, world: World
) -> Sampler:
    """The sampler that the recipe names.

    Args:
        settings: the recipe's `rollout` section.
        policy: whose weights are sampled from.
        tokenizer: of the policy.
        world: the ranks; only a server needs them.
    """
    if settings.sampler == "vllm":
        from trainer.sampling.vllm import VllmSampler

        return VllmSampler(settings.vllm_url, tokenizer, world)
    from trainer.sampling.local import LocalSampler

    return LocalSampler(policy, tokenizer)
