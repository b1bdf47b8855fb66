"""What makes a step fast on a GPU: no wait while packs run, joined products, and less memory for the same values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compiled import rows_of
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.prefetch import Prefetched, prefetched
from trainer.training.schedule import AdamParams

ADAM = AdamParams(1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0)
LENGTHS = ((200, 90, 30), (140, 150, 61, 9), (250,))


def policy_of(model_dir: Any, device: torch.device, run_on: torch.device | None = None, **changes: Any) -> Policy:
    settings = ModelSettings(path=str(model_dir), compute_dtype="float32", **changes)
    policy = load_policy(settings, LoraSettings(rank=4), 0, device, run_on)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in policy.trained_parameters().values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return policy


def gradients(policy: Policy, pack: Batch) -> dict[str, torch.Tensor]:
    policy.train()
    parameters = policy.trained_parameters()
    found = torch.autograd.grad(policy(pack).logprobs.sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@contextmanager
def waits_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packs_are_copied_and_run_without_a_wait(cuda, model_dir):
    learner = Learner(policy_of(model_dir, cuda), World(0, 1, cuda))
    for lengths in (*LENGTHS, *LENGTHS):  # what is compiled or made once
        learner.learn([Batch.pack(rows_of(lengths), cuda)], sft_loss, ADAM, denominator=100.0)
    with waits_refused():
        for lengths in LENGTHS:
            assert learner.forward_backward(Batch.pack(rows_of(lengths), cuda), sft_loss) is not None
    learner.optim_step(ADAM, 100.0)


def test_a_pack_made_ahead_is_the_pack(cuda):
    made = prefetched((Batch.pack(rows_of(lengths), cuda) for lengths in LENGTHS), cuda)
    assert isinstance(made, Prefetched)
    for pack, lengths in zip(made, LENGTHS, strict=True):
        expected = Batch.pack(rows_of(lengths), torch.device("cpu"), is_padded=True)
        assert torch.equal(pack.token_ids.cpu(), expected.token_ids)
        assert torch.equal(pack.layout.coordinates().cpu(), expected.layout.coordinates())
    made.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": True, "activation_offload": True},
        {"compile_layers": False},
    ],
    ids=["selective", "offload", "uncompiled"],
)
def test_gradients_are_those_of_compiled_layers(cuda, model_dir, changes):
    """Which compute q, k, v and gate, up as one product each."""
    plain, ours = policy_of(model_dir, cuda), policy_of(model_dir, cuda, **changes)
    for number, lengths in enumerate(LENGTHS):
        pack = Batch.pack(rows_of(lengths), cuda)
        found, wanted = gradients(ours, pack), gradients(plain, pack)
        assert plain.compiled is not None
        assert len(plain.compiled.groups) == (0 if number == 0 else 4), "two in each of two layers"
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    assert plain.compiled is not None
    assert plain.compiled.problem is None
    assert ours.compiled is None or ours.compiled.problem is None


@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_a_sharded_policy_computes_what_a_whole_one_does(cuda, model_dir, checkpointing):
    """One rank, which has all parts: FSDP's hooks are around the compiled layers, each with its own base weights."""
    distributed.init_process_group("nccl", store=HashStore(), rank=0, world_size=1, device_id=cuda)
    try:
        whole = policy_of(model_dir, cuda)
        sharded = policy_of(model_dir, torch.device("cpu"), run_on=cuda, gradient_checkpointing=checkpointing)
        sharded.shard(init_device_mesh("cuda", (1,)), cuda)
        for lengths in LENGTHS:
            pack = Batch.pack(rows_of(lengths), cuda)
            found, wanted = gradients(sharded, pack), gradients(whole, pack)
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
        assert sharded.compiled is not None
        assert sharded.compiled.problem is None
        assert [len(group.weights) for group in sharded.compiled.groups] == [3, 2] * 2
    finally:
        distributed.destroy_process_group()


def test_moments_in_eight_bits_learn_on_the_device(cuda, model_dir):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(ModelSettings(path=str(model_dir)), LoraSettings(rank=128), 0, cuda)
    learner = Learner(policy, World(0, 1, cuda), optimizer="adamw_8bit")
    pack = Batch.pack(rows_of((200, 90)), cuda)
    losses = [learner.learn([pack], sft_loss, ADAM, denominator=288.0).metrics["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    kinds = {value.dtype for name, value in learner.state_tensors().items() if name.endswith("state1")}
    assert torch.uint8 in kinds
