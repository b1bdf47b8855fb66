"""Compiled layers of a sharded policy: what they gather, keep and guard on; torch's `fake` process group moves nothing.

Ranks that compute are in tests/integration/test_sharded.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled import CPU, PACKS, gpu_path, graphs_of, make_pack
from counted import Counting
from tiny import tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.config.load import find_shape
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.config.shape import TrainingShape
from trainer.distributed.world import World
from trainer.model import attention
from trainer.model.policy import Policy, make_policy
from trainer.planning.communication import exchanged
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss

__all__ = ["gpu_path"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* is already registered as pytree node:UserWarning"),
]
LORA = LoraSettings(rank=4)


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> Iterator[TrainingShape]:
    """Of this name; the `fake` group has its ranks."""
    found = find_shape(getattr(request, "param", "h100x8"))
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=found.num_ranks)
    yield found
    distributed.destroy_process_group()


def sharded_policy(lora: LoraSettings | None, shape: TrainingShape) -> tuple[Policy, list[Any]]:
    attention.register()
    model = tiny_model("llama", attn_implementation=attention.PACKED_ATTENTION, head_dim=16, num_hidden_layers=3)
    policy = make_policy(model.requires_grad_(False), ModelSettings(path="none", compute_dtype="bfloat16"), lora, 0)
    graphs, backend = graphs_of()
    policy.bfloat16().compile_layers(backend)
    copies = shape.num_ranks // shape.num_shards
    sizes, names = (
        ((shape.num_ranks,), ("ranks",)) if copies == 1 else ((copies, shape.num_shards), ("copies", "shards"))
    )
    policy.shard(init_device_mesh("cpu", sizes, mesh_dim_names=names), CPU)
    return policy, graphs


@pytest.mark.parametrize(
    ("shape", "lora"),
    [
        ("h100x8", LORA),
        ("h100x16_hsdp", None),
        pytest.param("h100x8", None, marks=pytest.mark.heavy),
        pytest.param("h100x16_hsdp", LORA, marks=pytest.mark.heavy),
    ],
    indirect=["shape"],
)
def test_each_pass_gathers_the_bytes_of_the_cost_report(shape, lora):
    """As uncompiled layers do (test_communication.py), from one graph for all layers and packs."""
    policy, graphs = sharded_policy(lora, shape)
    learner = Learner(policy, World(0, shape.num_ranks, CPU, mesh=None))
    sizes = {name: value.numel() for name, value in policy.named_parameters() if "lora_" not in name}
    unsplit = sum(size for name, size in sizes.items() if ".layers." not in name)
    said = exchanged(shape, sum(sizes.values()), unsplit, None if lora is None else 1)
    torch._dynamo.utils.counters.clear()
    for number, lengths in enumerate(PACKS):
        with Counting() as counting:
            learner.forward_backward(make_pack(lengths), sft_loss)
        shards = shape.num_shards
        assert counting.received["_allgather_base_", shards] == pytest.approx(said.gathered)
        assert counting.received["_reduce_scatter_base_", shards] == pytest.approx(said.scattered)
        assert counting.received["allreduce_", shape.num_ranks // shards] == pytest.approx(said.summed_between_copies)
        assert len(graphs) == (0 if number == 0 else 1)
    assert policy.compiled is not None
    assert policy.compiled.problem is None
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_no_gathered_weight_is_kept_for_the_backward_pass(shape, lora):
    """Neither itself nor a copy: it is freed behind each layer's forward pass, and gathered again."""
    policy, graphs = sharded_policy(lora, shape)
    policy.train()
    for lengths in PACKS[:2]:
        policy(make_pack(lengths)).logprobs.sum().backward()
    held: list[torch.Tensor] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda each: each):
        output = policy(make_pack((256,)))
    tokens = {255, 256}  # scored, and all
    of_weights = [each.untyped_storage() for each in held if tokens.isdisjoint(each.shape)]
    storages = {each._cdata: each.nbytes() for each in of_weights}
    assert sum(size == 0 for size in storages.values()) >= 7 * 3, "gathered for three layers, and freed"
    adapters = 0 if lora is None else sum(value.nbytes for value in policy.trained_parameters().values())
    assert sum(storages.values()) < 1.1 * adapters + 2000, "A, joined, and B; nothing as large as a base weight"
    assert len(graphs) == 1
    del output


def test_base_weights_are_not_joined_and_sizes_are_constants(shape):
    """What FSDP gathers is what the operators read; an input for `head_dim` would reach the attention kernel."""
    policy, graphs = sharded_policy(LORA, shape)
    for lengths in PACKS[:2]:
        policy(make_pack(lengths)).logprobs.sum().backward()
    inputs = [node for node in graphs[0].graph.nodes if node.op == "placeholder"]
    assert not [node.name for node in inputs if "head_dim" in node.name]
    base = {node for node in inputs if "base_layer" in node.name}
    assert len(base) == 7
    readers = {str(user.target) for node in base for user in node.users}
    assert readers == {"trainer.lora_group.default", "trainer.lora_product.default", "trainer.lora_mlp.default"}
    assert policy.compiled is not None
    assert [len(group.weights) for group in policy.compiled.groups] == [3, 2] * 3


def test_five_graphs_at_most_and_none_with_adapters_where_they_are_off(shape):
    """FSDP lets the compiler skip checks of modules: a graph with adapters must not run for the reference."""
    policy, graphs = sharded_policy(LORA, shape)
    for lengths in PACKS:
        policy(make_pack(lengths)).logprobs.sum().backward()
    with torch.no_grad():
        for lengths in PACKS[1:]:
            policy(make_pack(lengths))
        before = len(graphs)
        with policy.adapter_off():
            for lengths in PACKS[1:]:
                policy(make_pack(lengths))
        assert len(graphs) == before + 1
        policy(make_pack(PACKS[1]))
    assert len(graphs) == before + 1 <= 5
    has_adapters = [any("lora" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert has_adapters == [True] * before + [False]


def test_layers_are_compiled_for_the_device_that_the_parts_go_to():
    """A sharded policy is loaded into host memory."""
    attention.register()

    def compiled_for(device: str | None) -> Any:
        model = tiny_model("llama", attn_implementation=attention.PACKED_ATTENTION).requires_grad_(False)
        settings = ModelSettings(path="none", gradient_checkpointing="selective" if device else False)
        return make_policy(model, settings, LORA, 0, run_on=None if device is None else torch.device(device)).compiled

    assert compiled_for(None) is None
    assert compiled_for("cuda").is_selective
