"""Run the largest micro-batch and sampling chunk before step 1, to fail early on out-of-memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from trainer.config.recipe import Recipe, RFTRecipe
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.context import ContextGroup
from trainer.distributed.world import World
from trainer.errors import ShapeError
from trainer.files import write_atomically
from trainer.model.batch import Batch
from trainer.model.kv_cache import last_growth
from trainer.model.policy import Policy, Reference
from trainer.planning.choose_shape import reachable_shapes
from trainer.planning.longest_pack import longest_pack
from trainer.planning.plan import Plan, RFTPlan
from trainer.planning.remedies import find_remedies, remedy_lines
from trainer.run.directory import RunDir
from trainer.sampling.local import LocalSampler
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams
from trainer.training.learner import Learner
from trainer.training.losses import PolicyLoss, sft_loss

OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory", "not enough memory", "defaultcpuallocator")
"""Parts of the messages of torch's allocators, in lower case."""


def probe_memory(learner: Learner, plan: Plan, reference: Reference | None = None) -> None:
    """Run the longest possible micro-batch forward and backward, and discard it; the run's results do not change.

    Args:
        learner: its gradient sums are used and zeroed afterwards. With a sharded model or context parallelism, all
            ranks call it together.
        plan: gives the longest micro-batch.
        reference: rft only.

    Raises:
        ShapeError: it does not fit into the device's memory.
    """
    if not is_probed(plan):
        return
    policy, world = learner.policy, learner.world
    lengths = longest_pack(plan.recipe, plan.shape)
    lengths = lengths if policy.separate_reason is None else [max(lengths)]
    with _explained(plan, f"the longest micro-batch ({sum(lengths):,} tokens)"), _generators_kept(world):
        learner.state_tensors()  # allocates the optimizer's state
        batch = longest_batch(lengths, policy.vocab_size, plan.recipe, world.device, world.context)
        try:
            _run(policy, batch, plan, reference)
        finally:
            policy.eval()
            learner.discard()


def probe_sampling(
    sampler: Sampler, params: SamplingParams, plan: RFTPlan, policy: Policy, world: World, run: RunDir
) -> None:
    """Sample one chunk of the longest prompts and completions, and discard it; the journal is not written.

    Completions end where their cache has grown for the last time: the rest of their length needs no more memory. What
    fitted is noted in the run directory and not sampled again by later attempts on the same shape and device.

    Args:
        sampler: of the run; a server has memory of its own and is not probed.
        params: of training, but no stop token or string ends a completion early.
        plan: gives the size of a chunk.
        policy: its weights are published to the sampler.
        world: the ranks.
        run: remembers what fitted.

    Raises:
        ShapeError: it does not fit into the device's memory.
    """
    rollout = plan.recipe.rollout
    if rollout.sampler != "local" or not is_probed(plan):
        return
    key, file = _probe_key(plan, world), run.root / f"probed-{world.rank}.json"
    if file.exists() and file.read_text() == key:
        return
    length = max(1, plan.recipe.data.max_seq_tokens - rollout.max_completion_tokens)
    num_prompts = min(rollout.chunk_prompts, -(-plan.recipe.rows_per_step // world.size))
    requests = [
        SampleRequest(tuple(_token_ids(length, policy.vocab_size, number)), number, rollout.group_size)
        for number in range(num_prompts)
    ]
    is_fast = isinstance(sampler, LocalSampler) and sampler.note is None  # slower decoders grow with each token
    num_tokens = rollout.max_completion_tokens
    if is_fast:
        num_tokens = min(num_tokens, last_growth(num_tokens - 1) + 1)  # the last token that is drawn is not cached
    endless = replace(params, stop=(), stop_ids=frozenset(), max_completion_tokens=num_tokens)
    what = f"a chunk of {num_prompts * rollout.group_size:,} completions of {rollout.max_completion_tokens:,} tokens"
    with _explained(plan, what), _generators_kept(world):
        sampler.publish(policy, 0)
        sampler.sample(requests, endless)
    write_atomically(file, key, durable=False)


def _probe_key(plan: RFTPlan, world: World) -> str:
    """What the memory of a chunk depends on: the recipe, the shape, and this rank's device."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parts = {"identity": plan.identity_hash, "shape": plan.shape.model_dump(mode="json"), "ranks": world.size}
    rollout = plan.recipe.rollout
    parts |= {"chunk_prompts": rollout.chunk_prompts, "max_seq_tokens": plan.recipe.data.max_seq_tokens}
    return json.dumps({**parts, "device": device, "torch": torch.__version__}, sort_keys=True) + "\n"


def is_probed(plan: Plan) -> bool:
    """Whether the recipe enables the probe; `auto` enables it on GPUs, where it takes seconds."""
    choice = plan.recipe.recovery.probe_memory
    return choice == "on" or (choice == "auto" and plan.shape.device == "cuda")


def longest_batch(
    lengths: Sequence[int], vocab: int, recipe: Recipe, device: torch.device, context: ContextGroup | None = None
) -> Batch:
    """A pack of random tokens with the inputs of the recipe's loss.

    Args:
        lengths: of the sequences, in tokens.
        vocab: token ids are below it.
        recipe: its method decides which tokens are trained.
        device: where the pack goes.
        context: ranks that compute it together; the result is this rank's slice.
    """
    sequences = []
    for number, length in enumerate(lengths):
        trained = min(length, recipe.rollout.max_completion_tokens) if isinstance(recipe, RFTRecipe) else length
        count = min(trained, length - 1)
        mask = (False,) * (length - trained) + (True,) * trained
        if not isinstance(recipe, RFTRecipe):
            inputs = TokenInputs(weights=(1.0,) * count)
        else:
            advantage = -1.0 if number % 2 else 1.0
            inputs = TokenInputs(advantages=(advantage,) * count, sampler_logprobs=(0.0,) * count)
        sequences.append(TokenSequence(tuple(_token_ids(length, vocab, number)), mask, inputs, f"probe:{number}"))
    return Batch.pack(sequences, device, context=context)


def _token_ids(length: int, vocab: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(length)]


def _run(policy: Policy, batch: Batch, plan: Plan, reference: Reference | None) -> None:
    if not isinstance(plan, RFTPlan):
        policy.train()
        sft_loss(policy(batch), batch).loss.sum().backward()
        return
    temperature = plan.recipe.rollout.temperature
    if reference is not None:
        batch = batch.with_logprobs(ref=reference.logprobs(batch, temperature))
    loss = PolicyLoss(plan.algorithm)
    policy.train()
    loss(policy(batch, temperature=temperature, with_entropy=True), batch).loss.sum().backward()


@contextmanager
def _generators_kept(world: World) -> Iterator[None]:
    """Restore torch's random generators afterwards: dropout draws from them."""
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        yield


@contextmanager
def _explained(plan: Plan, what: str) -> Iterator[None]:
    """Turn an out-of-memory error within the block into a message with remedies."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and not any(text in str(error).lower() for text in OUT_OF_MEMORY):
            raise
        text = out_of_memory(plan, what)
    else:
        return
    raise ShapeError(text)


def out_of_memory(plan: Plan, what: str) -> str:
    """The message of a probe that did not fit."""
    predicted = f"; {plan.memory.total_gib:.1f} GiB were predicted" if plan.memory is not None else ""
    free = _available_gib(plan.shape.device)
    lines = [
        f"out of memory before step 1: {what} does not fit. The shape {plan.shape.name} has "
        f"{plan.shape.gpu_memory_gib:g} GiB per device, {free:.1f} GiB are free here{predicted}."
    ]
    return "\n".join([*lines, *remedy_lines(find_remedies(plan.recipe, plan.shape, plan.facts, reachable_shapes()))])


def _available_gib(device: str) -> float:
    """Free memory of the device, or of this machine for the CPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    lines = Path("/proc/meminfo").read_text().splitlines()
    available_kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(available_kib) / 2**20
