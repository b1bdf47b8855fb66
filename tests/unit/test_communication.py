"""What ranks of a sharded model exchange, counted without ranks: torch's `fake` process group moves nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from counted import SLICES, Counting
from tiny import VOCAB_SIZE, tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.config.load import find_shape
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.distributed.context import ContextGroup
from trainer.distributed.world import World
from trainer.model import attention
from trainer.model.batch import Batch
from trainer.model.policy import Policy, make_policy
from trainer.planning.communication import exchanged, exchanged_in_attention
from trainer.planning.model_facts import ModelFacts
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.* is already registered as pytree node:UserWarning")


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    distributed.destroy_process_group()


def sharded_policy(lora: LoraSettings | None, ranks: int, shards: int) -> Policy:
    attention.register()
    model = tiny_model("llama", attn_implementation=attention.PACKED_ATTENTION, hidden_size=64, num_hidden_layers=3)
    policy = make_policy(model.bfloat16().requires_grad_(False), ModelSettings(path="none"), lora, 0)
    sizes, names = ((ranks,), ("ranks",)) if shards == ranks else ((ranks // shards, shards), ("copies", "shards"))
    policy.shard(init_device_mesh("cpu", sizes, mesh_dim_names=names), CPU)
    return policy


def make_pack() -> Batch:
    tokens = tuple(range(3, 43))
    assert max(tokens) < VOCAB_SIZE
    return Batch.pack([TokenSequence(tokens, (False,) + (True,) * 39, TokenInputs(weights=(1.0,) * 39))], CPU)


@pytest.mark.parametrize(("ranks", "name"), [(8, "h100x8"), (16, "h100x16"), (16, "h100x16_hsdp")], indirect=["ranks"])
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_bytes_are_those_of_the_cost_report(ranks, name, is_lora):
    shape = find_shape(name)
    policy = sharded_policy(LoraSettings(rank=16) if is_lora else None, ranks, shape.num_shards)
    learner = Learner(policy, World(0, ranks, CPU, mesh=None))
    sizes = {name: value.numel() for name, value in policy.named_parameters() if "lora_" not in name}
    unsplit = sum(size for name, size in sizes.items() if ".layers." not in name)
    adapter = sum(value.numel() for value in policy.trained_parameters().values()) if is_lora else None
    with Counting() as counting:
        learner.forward_backward(make_pack(), sft_loss)
    first = dict(counting.received)
    with Counting() as counting:
        learner.forward_backward(make_pack(), sft_loss)
    assert dict(counting.received) == first, "each micro-batch gathers again"
    said = exchanged(shape, sum(sizes.values()), unsplit, adapter)
    shards = shape.num_shards
    assert counting.received["_allgather_base_", shards] == pytest.approx(said.gathered)
    assert counting.received["_reduce_scatter_base_", shards] == pytest.approx(said.scattered)
    assert counting.received["allreduce_", ranks // shards] == pytest.approx(said.summed_between_copies)
    if is_lora:
        with Counting() as counting:  # as optim_step does, once
            learner.world.sum_in_place(learner._gradient)
        assert counting.received["allreduce_", ranks] == pytest.approx(said.per_step)


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_bytes_of_slices_are_those_of_the_cost_report(ranks, is_checkpointed):
    attention.register()
    model = tiny_model("llama", attn_implementation=attention.PACKED_ATTENTION, num_hidden_layers=3)
    settings = ModelSettings(path="none", gradient_checkpointing=is_checkpointed)
    policy = make_policy(model.bfloat16().requires_grad_(False), settings, LoraSettings(rank=4), 0)
    group, _ = distributed.new_subgroups(2)
    assert group is not None
    context = ContextGroup(0, 2, group)
    policy.run_on_slices()
    learner = Learner(policy, World(0, ranks, CPU, context=context))
    tokens = tuple(range(3, 43))
    row = TokenSequence(tokens, (False,) + (True,) * 39, TokenInputs(weights=(1.0,) * 39))
    policy.train()
    with Counting() as counting:
        learner.forward_backward(Batch.pack([row], CPU, context=context), sft_loss)
    facts = ModelFacts(hidden=32, layers=3, query_width=32, key_width=16, intermediate=64, vocab=320, is_tied=False)
    shape = find_shape("cpu").model_copy(update={"gpus": ranks, "context_parallel": 2, "micro_batch_tokens": 20})
    assert shape.pack_tokens == len(tokens)
    said = exchanged_in_attention(shape, facts, is_checkpointed)
    assert sum(counting.received[name, 2] for name in SLICES) == said
    assert all(counting.received[name, 2] for name in SLICES)
