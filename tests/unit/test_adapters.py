"""Several adapters on one base: a pack of two owners gives each what a pack of its own gives, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.errors import ModelError
from trainer.model.adapters import RUN_ADAPTER, Adapters
from trainer.model.base_model import load_base
from trainer.model.batch import Batch
from trainer.model.lora_linear import Routing
from trainer.model.policy import Policy, load_policy
from trainer.model.trees import Tree
from trainer.training.learner import Learner

CPU = torch.device("cpu")
LORA = {
    "small": LoraSettings(rank=4, alpha=16.0, target_modules=["q_proj", "v_proj", "down_proj"]),
    "large": LoraSettings(rank=8, alpha=8.0, target_modules=["v_proj", "o_proj", "gate_proj", "down_proj"]),
}
"""Of other ranks, scales and layers; some layers have both, some one, k_proj and up_proj none."""
OWNERS = ("small", "large", "large", "small")
LENGTHS = (17, 40, 9, 23)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", scale=5.0)


@torch.no_grad()
def fill(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def two_adapters(model_dir, *, is_checkpointed: bool = False, **changes: LoraSettings) -> Policy:
    settings = ModelSettings(path=str(model_dir), compute_dtype="float32")
    base, routing = load_base(settings, CPU), Routing()
    if is_checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": routing.checkpoint_contexts})
    adapters = Adapters(base, routing)
    for seed, (name, lora) in enumerate({**LORA, **changes}.items()):
        adapters.add(name, lora, seed)
        fill(adapters.parameters(name), seed)
    return Policy(base, adapters, str(model_dir))


def sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()) for length in LENGTHS]
    return [TokenSequence(ids, (False, False) + (True,) * (len(ids) - 2)) for ids in rows]


def of(owner: str) -> list[TokenSequence]:
    return [row for row, name in zip(sequences(), OWNERS, strict=True) if name == owner]


def scored(policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs, and the gradient of a weighted sum of them for every parameter that gets one.

    The weights of a token depend on the token and its position in the sequence alone.
    """
    policy.zero_grad()
    policy.train()
    logprobs = policy(batch).logprobs
    (logprobs * torch.cos(batch.targets + batch.positions[batch.scored])).sum().backward()
    assert policy.adapters is not None
    named = {name: value for each in policy.adapters.names for name, value in policy.trained_parameters(each).items()}
    return logprobs.detach(), {name: value.grad for name, value in named.items() if value.grad is not None}


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_each_owner_gets_the_logprobs_and_gradients_of_being_alone(model_dir, is_checkpointed):
    policy = two_adapters(model_dir, is_checkpointed=is_checkpointed)
    together = Batch.pack(sequences(), CPU, adapters=OWNERS)
    logprobs, gradients = scored(policy, together)
    assert policy.adapters is not None
    assert {name.split(".")[-2] for name in gradients} == {"small", "large"}
    for owner in LORA:
        rows = of(owner)
        policy.adapters.activate(owner)
        alone, own_gradients = scored(policy, Batch.pack(rows, CPU))  # the fused layer, without routing
        is_own = torch.tensor([OWNERS[number] == owner for number in together.sequence_ids.tolist()])
        assert torch.equal(logprobs[is_own], alone)
        assert own_gradients.keys() == policy.trained_parameters(owner).keys()
        for name, gradient in own_gradients.items():
            assert gradient.abs().max() > 0, name
            assert torch.equal(gradients[name], gradient), name


def test_the_adapters_of_this_test_differ_from_each_other_and_from_the_base(model_dir):
    policy, rows = two_adapters(model_dir), sequences()
    assert policy.adapters is not None
    found = []
    for owner in LORA:
        found.append(scored(policy, Batch.pack(rows, CPU, adapters=[owner] * len(rows)))[0])
    with policy.adapter_off(), torch.no_grad():
        found.append(policy(Batch.pack(rows, CPU)).logprobs)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (found[first] - found[second]).abs().mean() > 0.1


def test_trees_belong_to_their_owner_with_their_prefix(model_dir):
    policy, rows = two_adapters(model_dir), sequences()
    branches = [TokenSequence(rows[0].token_ids + row.token_ids, (False,) * 17 + (True,) * len(row.token_ids))
                for row in rows[1:3]]  # fmt: skip
    trees = [Tree(tuple(branches), 17), Tree.of_one(rows[3])]
    together = Batch.pack_trees(trees, CPU, adapters=["large", "small"])
    assert together.owners is not None
    assert {name: len(positions) for name, positions in together.owners.rows.items()} == {"large": 66, "small": 23}
    logprobs, gradients = scored(policy, together)
    assert policy.adapters is not None
    policy.adapters.activate("large")
    alone, own_gradients = scored(policy, Batch.pack_trees(trees[:1], CPU))
    assert torch.equal(logprobs[: len(alone)], alone)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in own_gradients.items())


def test_each_learner_owns_the_parameters_of_one_adapter(model_dir):
    """A pack of both owners fills the gradient sums of both learners, each with its own share."""
    policy = two_adapters(model_dir)
    world = World(0, 1, CPU)
    learners = {name: Learner(policy, world, adapter=name) for name in LORA}
    assert not learners["small"].masters.keys() & learners["large"].masters.keys()
    logprobs = policy(Batch.pack(sequences(), CPU, adapters=OWNERS)).logprobs
    logprobs.sum().backward()
    for name, learner in learners.items():
        alone = two_adapters(model_dir)
        assert alone.adapters is not None
        alone.adapters.activate(name)
        alone(Batch.pack(of(name), CPU)).logprobs.sum().backward()
        for key, parameter in alone.trained_parameters(name).items():
            ours = learner.masters[key].grad
            assert ours is not None
            assert parameter.grad is not None
            assert torch.equal(ours, parameter.grad), key


def test_the_name_of_an_adapter_changes_no_file(model_dir, tmp_path):
    lora = LoraSettings(rank=4)
    settings = ModelSettings(path=str(model_dir), compute_dtype="float32")
    policy, base = load_policy(settings, lora, 7, CPU), load_base(settings, CPU)
    adapters = Adapters(base)
    adapters.add("tenant", lora, 7)
    other = Policy(base, adapters, str(model_dir))
    for each, name, directory in ((policy, RUN_ADAPTER, tmp_path / "run"), (other, "tenant", tmp_path / "tenant")):
        directory.mkdir()
        each.save(directory, each.trained_parameters(name), name)
    files = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "tenant").iterdir())
    assert "adapter_model.safetensors" in files
    for file in files:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "tenant" / file).read_bytes(), file


def test_one_of_two_adapters_is_saved_alone_and_read_back(model_dir, tmp_path):
    policy = two_adapters(model_dir)
    assert policy.adapters is not None
    parameters = policy.trained_parameters("large")
    policy.save(tmp_path, parameters, "large")
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(parameters) == 2 * 4 * 2
    loaded = policy.adapters.load_tensors("large", tmp_path)
    assert all(torch.equal(loaded[name], parameter) for name, parameter in parameters.items())
    with pytest.raises(ModelError, match="its weights are not those of this model and adapter"):
        policy.adapters.load_tensors("small", tmp_path)


def refused(model_dir, names: list[str], **changes: LoraSettings) -> Iterator[str]:
    policy = two_adapters(model_dir, is_checkpointed=False, **changes)
    policy.train()
    with pytest.raises(ModelError) as caught:
        policy(Batch.pack(sequences(), CPU, adapters=names))
    yield str(caught.value)


def test_packs_that_cannot_be_routed_are_refused(model_dir):
    names = ["small", "large", "large", "third"]
    assert list(refused(model_dir, names)) == ["no adapter third; there are small, large"]
    dropout = LORA["large"].model_copy(update={"dropout": 0.5})
    assert list(refused(model_dir, list(OWNERS), large=dropout)) == [
        "adapter large: DoRA and dropout are not supported in packs of several adapters"
    ]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_adapters_of_fused_experts_are_refused(tmp_path):
    policy = load_policy(
        ModelSettings(path=str(tiny_model_dir(tmp_path, "mixtral")), compute_dtype="float32"),
        LoraSettings(rank=2),
        0,
        CPU,
    )
    rows = sequences()
    with pytest.raises(ModelError, match="layers do not support packs of several adapters"):
        policy(Batch.pack(rows, CPU, adapters=[RUN_ADAPTER] * len(rows)))


def test_after_a_routed_pack_the_active_adapter_is_used_again(model_dir):
    policy, rows = two_adapters(model_dir), sequences()
    before = scored(policy, Batch.pack(rows, CPU))[0]
    scored(policy, Batch.pack(rows, CPU, adapters=["large"] * len(rows)))
    assert torch.equal(scored(policy, Batch.pack(rows, CPU))[0], before)
