"""What is kept for the backward pass: selective checkpointing in compiled layers, and inputs of layers on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import PACKS, gpu_path, gradients, graphs_of, make_pack, make_policy
from small_recipe import SFT, write_small
from tiny import tiny_model_dir

from trainer.config.load import find_shape, load_recipe
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.config.unsupported import OFFLOAD_CPU, OFFLOAD_KEEPS, SELECTIVE_UNCOMPILED
from trainer.errors import ModelError, RecipeError
from trainer.model.offload import InHostMemory
from trainer.model.policy import Policy, load_policy
from trainer.planning.activations import Pass
from trainer.planning.fit import misfit
from trainer.planning.memory import estimate_memory
from trainer.planning.model_facts import ModelFacts, find_model_facts

__all__ = ["gpu_path"]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
CPU = torch.device("cpu")
TOKENS = 256


def compiled_policy(model_dir: Path, lora: LoraSettings | None, *, is_selective: bool) -> Policy:
    """Compiled; the first pass, which is not, is over."""
    policy = make_policy(model_dir, lora, checkpointing=is_selective)  # as `load_policy` makes it
    policy.compile_layers(graphs_of()[1], is_selective=is_selective)
    gradients(policy, make_pack(PACKS[0]))
    return policy


def kept_bytes(policy: Policy) -> int:
    """Bytes that grow with the pack and are kept by its forward pass, each storage once."""
    own = {value.untyped_storage().data_ptr() for value in policy.causal_lm.parameters()}
    held: list[torch.Tensor] = []
    policy.train()

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda each: each):
        output = policy._hidden(make_pack((TOKENS,)))
    del output
    storages = {each.untyped_storage().data_ptr(): each for each in held if TOKENS in each.shape}
    return sum(each.untyped_storage().nbytes() for pointer, each in storages.items() if pointer not in own)


def facts_of(model_dir: Path) -> ModelFacts:
    facts = find_model_facts(str(model_dir), [], None)
    assert facts is not None
    return facts


def test_selective_checkpointing_keeps_products_and_attention_only(tmp_path):
    """The bytes of the estimate but for what does not belong to a block, and the values of whole layers."""
    model_dir = tiny_model_dir(tmp_path / "model", "llama", head_dim=16)
    ours = compiled_policy(model_dir, LoraSettings(rank=4), is_selective=True)
    assert_as_estimated(ours, model_dir, 4)
    pack = make_pack((TOKENS,))
    (logprobs, found), (expected, wanted) = (
        gradients(policy, pack) for policy in (ours, make_policy(model_dir, LoraSettings(rank=4)))
    )
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


def assert_as_estimated(policy: Policy, model_dir: Path, rank: int | None) -> None:
    assert policy.compiled is not None
    facts = facts_of(model_dir)
    micro = Pass(facts, [TOKENS], TOKENS - 1, 4, rank, is_cpu=False)
    # Beside the blocks: the last norm keeps its input and a number a token; cosines and sines of positions, twice
    beside = TOKENS * 4 * (facts.hidden + 1 + 2 * 2 * 16)
    predicted = micro.kept(recomputed="selective")
    assert predicted <= kept_bytes(policy) <= predicted + beside
    assert policy.compiled.problem is None
    assert predicted < 0.7 * micro.kept(recomputed=False)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_selective_checkpointing_has_the_bits_of_compiled_layers_without_it(tmp_path, kind):
    model_dir = tiny_model_dir(tmp_path / "model", "llama", head_dim=16)
    lora = LoraSettings(rank=4) if kind == "lora" else None
    plain, ours = (compiled_policy(model_dir, lora, is_selective=each) for each in (False, True))
    pack = make_pack(PACKS[1])
    (logprobs, found), (expected, wanted) = gradients(ours, pack), gradients(plain, pack)
    assert torch.equal(logprobs, expected)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    with torch.no_grad():
        torch.testing.assert_close(ours(pack).logprobs, plain(pack).logprobs, rtol=1e-5, atol=1e-6)
    assert kept_bytes(ours) < 0.8 * kept_bytes(plain)
    assert_as_estimated(ours, model_dir, 4 if lora else None)


def test_the_first_pass_is_checkpointed_as_a_whole(tmp_path, monkeypatch):
    """It runs uncompiled, where nothing is selected, and must not need more memory than later ones."""
    model_dir = tiny_model_dir(tmp_path / "model", "llama", head_dim=16)
    policy = make_policy(model_dir, LoraSettings(rank=4), checkpointing=True)
    policy.compile_layers(graphs_of()[1], is_selective=True)
    facts = facts_of(model_dir)
    assert kept_bytes(policy) < 2 * facts.layers * TOKENS * 4 * facts.hidden


def settings_of(model_dir: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(path=str(model_dir), compute_dtype="float32", **changes)


def test_selective_checkpointing_without_compiled_layers_is_refused_by_the_run(tmp_path):
    model_dir = tiny_model_dir(tmp_path / "model", "llama")
    with pytest.raises(ModelError, match="selective recomputes only in compiled layers"):
        load_policy(settings_of(model_dir, gradient_checkpointing="selective"), LoraSettings(rank=4), 0, CPU)
    policy = make_policy(model_dir, LoraSettings(rank=4))
    policy.compile_layers(graphs_of()[1], is_selective=True)
    with pytest.raises(ModelError, match="selective recomputes only in compiled layers"):
        policy.run_separately("its sequences are not packed")


@pytest.mark.parametrize(
    ("shape", "changes", "problem"),
    [
        ("cpu", ["model.gradient_checkpointing=selective"], SELECTIVE_UNCOMPILED),
        ("h100x8", ["model.gradient_checkpointing=selective"], None),
        ("sliced", ["model.gradient_checkpointing=selective"], SELECTIVE_UNCOMPILED),
        ("h100x1", ["model.gradient_checkpointing=selective", "lora.dora=true"], SELECTIVE_UNCOMPILED),
        ("h100x1", ["model.gradient_checkpointing=selective", "lora.dropout=0.1"], SELECTIVE_UNCOMPILED),
        ("h100x1", ["model.gradient_checkpointing=selective", "model.compile_layers=false"], SELECTIVE_UNCOMPILED),
        ("h100x1", ["model.gradient_checkpointing=selective", "model.quantization=nf4"], SELECTIVE_UNCOMPILED),
        ("h100x1", ["model.gradient_checkpointing=selective"], None),
        ("cpu", ["model.gradient_checkpointing=true", "model.activation_offload=true"], OFFLOAD_CPU),
        ("h100x1", ["model.gradient_checkpointing=true", "model.activation_offload=true"], None),
    ],
)
def test_check_refuses_what_the_run_would(tmp_path, monkeypatch, shape, changes, problem):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_small(tmp_path, SFT), changes).recipe
    sliced = find_shape("h100x1").model_copy(update={"gpus": 2, "context_parallel": 2})
    found = misfit(recipe, sliced if shape == "sliced" else find_shape(shape), None)
    assert (found is None) == (problem is None)
    assert problem is None or problem in str(found)


@pytest.mark.parametrize("value", ["false", "selective"])
def test_offloading_needs_whole_checkpointing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    changes = [f"model.gradient_checkpointing={value}", "model.activation_offload=true"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_small(tmp_path, SFT), changes)
    assert OFFLOAD_KEEPS in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_inputs_of_layers_that_were_on_the_host_give_the_same_bits(tmp_path, kind):
    model_dir = tiny_model_dir(tmp_path / "model", "llama")
    lora = LoraSettings(rank=4) if kind == "lora" else None
    policies = [
        load_policy(settings_of(model_dir, gradient_checkpointing=True, activation_offload=each), lora, 0, CPU)
        for each in (False, True)
    ]
    pack = make_pack((40, 7))
    (expected, wanted), (logprobs, found) = (gradients(policy, pack) for policy in policies)
    assert torch.equal(logprobs, expected)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    plain, offload = policies[0].offload, policies[1].offload
    assert plain is None
    assert offload is not None
    assert offload.num_moved >= 2, "at least the input of each layer"
    before = offload.num_moved
    with torch.no_grad():
        policies[1](pack)
    assert offload.num_moved == before, "without a backward pass nothing is moved"


def test_what_is_on_the_host_is_a_copy():
    tensor = torch.randn(1, 5, 8)
    kept, before = InHostMemory(tensor), tensor.clone()
    tensor.zero_()
    assert torch.equal(kept.back(), before)
    assert kept.back().data_ptr() != kept.back().data_ptr()


def test_only_hidden_states_are_moved(tmp_path):
    model_dir = tiny_model_dir(tmp_path / "model", "llama")
    policy = load_policy(
        settings_of(model_dir, gradient_checkpointing=True, activation_offload=True), LoraSettings(rank=4), 0, CPU
    )
    offload = policy.offload
    assert offload is not None
    for shape in ((1, 5, 16), (32, 32), (1, 5, 1)):  # cosines, weights, statistics
        tensor = torch.zeros(shape)
        assert offload._pack(tensor) is tensor
    assert isinstance(offload._pack(torch.zeros(1, 5, 32)), InHostMemory)


def test_the_estimate_knows_each(tmp_path, monkeypatch):
    """Llama-3.1-8B at 4,096 tokens a row on one H100: everything can be kept, so nothing need be recomputed."""
    monkeypatch.chdir(tmp_path)
    facts = ModelFacts(
        hidden=4096, layers=32, query_width=4096, key_width=1024, intermediate=14_336, vocab=128_256, is_tied=False,
        heads=32, model_type="llama",
    )  # fmt: skip
    sizes: dict[str, float] = {}
    for name, changes in {
        "none": [],
        "selective": ["model.gradient_checkpointing=selective"],
        "all": ["model.gradient_checkpointing=true"],
        "offload": ["model.gradient_checkpointing=true", "model.activation_offload=true"],
    }.items():
        recipe = load_recipe(
            write_small(tmp_path, SFT), [*changes, "data.max_seq_tokens=4096", "model.compute_dtype=bfloat16"]
        ).recipe
        estimate = estimate_memory(recipe, find_shape("h100x1"), facts)
        sizes[name] = next(size for part, size in estimate.parts.items() if part.startswith("activations"))
        assert estimate.fits, name
    assert sizes["none"] > 1.5 * sizes["selective"] > 1.5 * sizes["all"] > 1.5 * sizes["offload"]
    per_token = 2 * 4096 + 2 * (4096 + 1024) + 2 * 14_336
    tokens = 2 * 4096  # the two rows of a step
    assert sizes["selective"] * 2**30 == pytest.approx(32 * tokens * 2 * per_token, rel=0.03)
    assert sizes["offload"] * 2**30 == 2 * tokens * 4096 * 2  # the inputs of two layers
