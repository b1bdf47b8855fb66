"""Run by every rank under torchrun: packs computed by several ranks together, and by one; prints how far they differ.

torchrun --nproc_per_node 2 context_ranks.py MODEL_DIR lora|full LENGTH,LENGTH,... [checkpointing] [sharded]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.leaving import exit_with
from trainer.distributed.sharding import whole_of
from trainer.distributed.world import World, join_world, leave_world
from trainer.model.batch import Batch
from trainer.model.packing_check import verify_packing, verify_slices
from trainer.model.policy import Policy, load_policy
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss


def sequence(length: int, vocab: int, seed: int) -> TokenSequence:
    """Random tokens of unequal weight; the first third is not trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
    mask = tuple(place >= max(1, length // 3) for place in range(length))
    weights = tuple(0.5 + 0.25 * (place % 5) for place in range(sum(mask[1:])))
    return TokenSequence(tuple(ids), mask, TokenInputs(weights=weights), f"rows.jsonl:{seed}")


def make_policy(model_dir: Path, kind: str, *, is_checkpointed: bool) -> Policy:
    settings = ModelSettings(path=str(model_dir), compute_dtype="float32", gradient_checkpointing=is_checkpointed)
    policy = load_policy(settings, LoraSettings(rank=4, alpha=8) if kind == "lora" else None, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():  # a new adapter adds nothing
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def gradients(learner: Learner, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Of all ranks, flat, and the sums of the loss."""
    result = learner.forward_backward(batch, sft_loss)
    assert result is not None
    return result.logprobs, dict(result.sums)


def main(model_dir: Path, kind: str, lengths: list[int], *, is_checkpointed: bool, is_sharded: bool) -> int:
    size = int(os.environ["WORLD_SIZE"])
    world = join_world("cpu", size, num_shards=size if is_sharded else 1, context_size=2)
    assert world.context is not None
    alone, split = (make_policy(model_dir, kind, is_checkpointed=is_checkpointed) for _ in range(2))
    if world.mesh is not None:
        split.shard(world.mesh, world.device)
    verify_packing(split, world.device)
    split.run_on_slices()
    verify_slices(split, world, world.context)
    sequences = [sequence(length, alone.vocab_size, 10 * world.share + number) for number, length in enumerate(lengths)]
    every = [
        sequence(length, alone.vocab_size, 10 * share + number)
        for share in range(world.num_shares)
        for number, length in enumerate(lengths)
    ]
    one = Learner(alone, World(0, 1, world.device))
    many = Learner(split, world)
    pack = Batch.pack(sequences, world.device, context=world.context)
    assert pack.part is not None
    ours, our_sums = gradients(many, pack)
    whole = Batch.pack(sequences, world.device)
    wanted = alone(whole).logprobs.detach()
    mine = torch.isin(whole.scored, pack.part.rows[pack.scored])
    logprobs = float((ours - wanted[mine]).abs().max()) if len(ours) else 0.0
    _, their_sums = gradients(one, Batch.pack(every, world.device))
    dummy = many.forward_backward(Batch.dummy(world.device, world.context), sft_loss)
    assert dummy is not None
    if not many.is_sharded:
        world.sum_in_place(many._gradient)
    distance, largest = 0.0, 0.0
    for name, parameter in many.parameters.items():
        master = many.masters[name]
        assert master.grad is not None
        wanted_gradient = one.masters[name].grad
        assert wanted_gradient is not None
        found = master.grad
        if many.is_sharded:
            assert parameter.grad is not None
            found = whole_of(parameter.grad)
        distance = max(distance, float((found - wanted_gradient).abs().max()))
        largest = max(largest, float(wanted_gradient.abs().max()))
    summed = world.sum_by_name(our_sums)
    about = world.gather({"logprobs": logprobs, "scored": len(ours), "tokens": pack.num_tokens})
    if world.is_main:
        found_all = {"ranks": about, "gradient": distance, "largest": largest, "ours": summed, "theirs": their_sums}
        sys.stdout.write(json.dumps(found_all) + "\n")
    leave_world(world)
    return 0


if __name__ == "__main__":
    options = set(sys.argv[4:])
    exit_with(
        lambda: main(
            Path(sys.argv[1]),
            sys.argv[2],
            [int(part) for part in sys.argv[3].split(",")],
            is_checkpointed="checkpointing" in options,
            is_sharded="sharded" in options,
        )
    )
