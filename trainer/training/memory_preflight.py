"""The longest micro-batch and chunk once before step 1: memory that is too small is met before time is spent."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from trainer.algorithms import sft
from trainer.algorithms.terms import PolicyTerms
from trainer.config.load import all_shapes
from trainer.config.recipe import Recipe, RFTRecipe
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.errors import ShapeError
from trainer.model.batch import Batch
from trainer.model.policy import Policy, Reference, Scores
from trainer.planning.longest_pack import longest_pack
from trainer.planning.plan import Plan, RFTPlan
from trainer.planning.remedies import find_remedies, remedy_lines
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams
from trainer.training.learner import Learner
from trainer.training.policy_update import PolicyLoss

SIGNS: Final = ("out of memory", "can't allocate memory", "not enough memory", "defaultcpuallocator")
"""In the messages of torch's allocators."""


def probe_memory(learner: Learner, plan: Plan, reference: Reference | None = None) -> None:
    """Run the longest possible micro-batch forward and backward, and forget it; changes no bit of the run.

    Args:
        learner: whose policy learns, and whose gradient sums take the gradients and are zero again afterwards. Where
            the model is sharded all ranks probe together.
        plan: says the longest micro-batch.
        reference: of rft.

    Raises:
        ShapeError: the device's memory does not hold it.
    """
    if not is_probed(plan):
        return
    policy, world = learner.policy, learner.world
    lengths = longest_pack(plan.recipe, plan.shape)
    head = policy.causal_lm.get_output_embeddings().weight
    with _in_words(plan, f"the longest micro-batch ({sum(lengths):,} tokens)"), _generators_kept(world):
        learner.state_tensors()  # the optimizer's state is there from here on
        batch = longest_batch(lengths, head.shape[0], plan.recipe, world.device)
        try:
            _run(policy, batch, plan, reference)
        finally:
            policy.eval()
            for master in learner.masters.values():
                if master.grad is not None:
                    master.grad.zero_()


def probe_sampling(sampler: Sampler, params: SamplingParams, plan: RFTPlan, policy: Policy, world: World) -> None:
    """Draw one chunk of the longest prompts and completions, and forget it; the journal does not see it.

    Args:
        sampler: which has the policy's weights; a server has memory of its own and is not asked.
        params: of training; nothing ends a completion early.
        plan: says the size of a chunk.
        policy: what answers.
        world: the ranks.

    Raises:
        ShapeError: the device's memory does not hold it.
    """
    rollout = plan.recipe.rollout
    if rollout.sampler != "local" or not is_probed(plan):
        return
    vocab = policy.causal_lm.get_output_embeddings().weight.shape[0]
    length = max(1, plan.recipe.data.max_seq_tokens - rollout.max_completion_tokens)
    num_prompts = min(rollout.chunk_prompts, -(-plan.recipe.rows_per_step // world.size))
    requests = [
        SampleRequest(tuple(_token_ids(length, vocab, number)), number, rollout.group_size)
        for number in range(num_prompts)
    ]
    endless = replace(params, stop=(), stop_ids=frozenset())
    what = f"a chunk of {num_prompts * rollout.group_size:,} completions of {rollout.max_completion_tokens:,} tokens"
    with _in_words(plan, what), _generators_kept(world):
        sampler.publish(policy, 0)
        sampler.sample(requests, endless)


def is_probed(plan: Plan) -> bool:
    """Whether the recipe asks for it; `auto` is yes on GPUs, where it takes seconds."""
    choice = plan.recipe.recovery.probe_memory
    return choice == "on" or (choice == "auto" and plan.shape.device == "cuda")


def longest_batch(lengths: Sequence[int], vocab: int, recipe: Recipe, device: torch.device) -> Batch:
    """A pack of sequences of these lengths, of random tokens, with what the recipe's loss reads.

    Args:
        lengths: in tokens.
        vocab: token ids are below.
        recipe: its method decides what is trained.
        device: where the pack goes.
    """
    sequences = []
    for number, length in enumerate(lengths):
        trained = min(length, recipe.rollout.max_completion_tokens) if isinstance(recipe, RFTRecipe) else length
        count = min(trained, length - 1)
        mask = (False,) * (length - trained) + (True,) * trained
        if not isinstance(recipe, RFTRecipe):
            inputs = {"weights": (1.0,) * count}
        else:
            inputs = {"advantages": (1.0 - number % 2 * 2.0,) * count, "sampler_logprobs": (0.0,) * count}
        sequences.append(TokenSequence(tuple(_token_ids(length, vocab, number)), mask, inputs, f"probe:{number}"))
    return Batch.pack(sequences, device)


def _token_ids(length: int, vocab: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(length)]


def _run(policy: Policy, batch: Batch, plan: Plan, reference: Reference | None) -> None:
    if not isinstance(plan, RFTPlan):
        policy.train()
        _sft_terms(policy(batch), batch).loss.sum().backward()
        return
    temperature = plan.recipe.rollout.temperature
    if reference is not None:
        batch = replace(batch, inputs={**batch.inputs, "ref_logprobs": reference.logprobs(batch, temperature)})
    loss = PolicyLoss(plan.algorithm)
    policy.train()
    loss(policy(batch, temperature=temperature, with_entropy=True), batch).loss.sum().backward()


def _sft_terms(scores: Scores, batch: Batch) -> PolicyTerms:
    return sft(scores.logprobs, batch.inputs["weights"])


@contextmanager
def _generators_kept(world: World) -> Iterator[None]:
    """Dropout draws from torch's generators; they are as before afterwards."""
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        yield


@contextmanager
def _in_words(plan: Plan, what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        text = out_of_memory(plan, what)
    else:
        return
    raise ShapeError(text)


def out_of_memory(plan: Plan, what: str) -> str:
    """What to say when a probe did not fit."""
    predicted = f"; {plan.memory.total_gib:.1f} GiB were predicted" if plan.memory is not None else ""
    free = _available_gib(plan.shape.device)
    lines = [
        f"out of memory before step 1: {what} does not fit. The shape {plan.shape.name} has "
        f"{plan.shape.gpu_memory_gib:g} GiB per device, {free:.1f} GiB are free here{predicted}."
    ]
    return "\n".join([*lines, *remedy_lines(find_remedies(plan.recipe, plan.shape, plan.facts, all_shapes()))])


def _available_gib(device: str) -> float:
    """Memory that nobody uses on this device, or on this machine for the CPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(found) / 2**20
