"""Compiled layers compute what uncompiled ones do, from one graph for packs of any length.

The GPU's path is traced here on CPU tensors: the compiler's back end runs its graphs as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled import CPU, PACKS, gpu_path, gradients, graphs_of, make_pack, make_policy
from tiny import tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.model.base_model import load_base
from trainer.model.compiled_layers import is_compilable

__all__ = ["gpu_path"]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"),
    [("qwen3", "lora", False), ("qwen3", "full", True), ("gemma2", "lora", True)],
    ids=["qwen3-lora", "qwen3-full-checkpointed", "gemma2-lora-checkpointed"],
)
def test_values_and_gradients_are_those_of_uncompiled_layers(tmp_path, family, kind, checkpointing):
    model_dir = tiny_model_dir(tmp_path / "model", family, head_dim=16)
    lora = LoraSettings(rank=4) if kind == "lora" else None
    plain, ours = (make_policy(model_dir, lora, checkpointing=checkpointing) for _ in range(2))
    graphs, backend = graphs_of()
    ours.compile_layers(backend)
    for number, lengths in enumerate(PACKS):
        batch = make_pack(lengths)
        logprobs, found = gradients(ours, batch)
        expected, wanted = gradients(plain, batch)
        assert (len(graphs) == 0) == (number == 0), "the first pass runs uncompiled"
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        for lengths in PACKS[1:]:
            torch.testing.assert_close(
                ours(make_pack(lengths)).logprobs, plain(make_pack(lengths)).logprobs, rtol=1e-4, atol=1e-5
            )
    kinds = 2 if family == "gemma2" else 1
    assert len(graphs) <= 5 * kinds
    assert ours.compiled is not None
    assert ours.compiled.problem is None


def test_the_product_is_one_operator_that_the_compiler_does_not_rewrite(tmp_path):
    policy = make_policy(tiny_model_dir(tmp_path / "model", "qwen3", head_dim=16), LoraSettings(rank=4))
    graphs, backend = graphs_of()
    policy.compile_layers(backend)
    for lengths in PACKS[:2]:
        gradients(policy, make_pack(lengths))
    targets = [str(node.target) for node in graphs[-1].graph.nodes]
    # q, k and v are one, o is another; gate, up and down are one with silu
    assert sum("lora_group" in target for target in targets) == 1
    assert sum("lora_product" in target for target in targets) == 1
    assert sum("lora_mlp" in target for target in targets) == 1
    assert not any("silu" in target for target in targets)
    assert not any("addmm" in target for target in targets)


def test_a_layer_that_does_not_compile_runs_as_it_is_and_says_so(tmp_path):
    from torch._dynamo.exc import Unsupported

    policy = make_policy(tiny_model_dir(tmp_path / "model", "qwen3", head_dim=16), LoraSettings(rank=4))

    def refuse(_graph: Any, _inputs: Any) -> Any:
        raise Unsupported("no such kernel")

    plain = policy(make_pack(PACKS[1])).logprobs
    policy.compile_layers(refuse)
    policy(make_pack(PACKS[0]))
    with torch.no_grad(), pytest.warns(UserWarning, match="uncompiled|without") as said:  # FlexAttention warns as well
        ours = policy(make_pack(PACKS[1])).logprobs
    assert any("run uncompiled, which is slower" in str(each.message) for each in said)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_dropout_dora_and_experts_stay_uncompiled(tmp_path):
    model = make_policy(tiny_model_dir(tmp_path / "dense", "qwen3", head_dim=16), None).causal_lm
    assert is_compilable(model, None)
    assert is_compilable(model, LoraSettings())
    assert not is_compilable(model, LoraSettings(dropout=0.1))
    assert not is_compilable(model, LoraSettings(dora=True))
    experts = load_base(ModelSettings(path=str(tiny_model_dir(tmp_path / "experts", "mixtral"))), CPU)
    assert not is_compilable(experts, LoraSettings())


def test_a_copied_model_runs_its_own_layers_and_copies_no_joined_weights(tmp_path):
    """As decoders of the local sampler copy it; they share parameters and buffers."""
    policy = make_policy(tiny_model_dir(tmp_path / "model", "qwen3", head_dim=16), LoraSettings(rank=4))
    policy.compile_layers(graphs_of()[1])
    for lengths in PACKS[:2]:
        gradients(policy, make_pack(lengths))
    compiled = policy.compiled
    assert compiled is not None
    source = policy.causal_lm
    copied: Any = copy.deepcopy(source, {id(each): each for each in (*source.parameters(), *source.buffers())})
    for layer, original in zip(copied.base_model.layers, compiled.layers, strict=True):
        assert layer is not original
        assert layer.forward.__self__ is layer
        assert layer.self_attn.q_proj.group.weight is original.self_attn.q_proj.group.weight
    pack = make_pack(PACKS[1])
    kept = pack.token_ids[None], pack.positions[None]
    states = [
        model.base_model(input_ids=kept[0], position_ids=kept[1], packed=pack.layout) for model in (source, copied)
    ]
    assert torch.equal(states[0].last_hidden_state, states[1].last_hidden_state)


def test_five_graphs_at_most_over_every_mode_and_number_of_blocks(tmp_path):
    """With gradient, without, in inference mode, without adapter; packs of one block, as many as heads, and others."""
    policy = make_policy(tiny_model_dir(tmp_path / "model", "qwen3", head_dim=16), LoraSettings(rank=4))
    graphs, backend = graphs_of()
    policy.compile_layers(backend)
    torch._dynamo.utils.counters.clear()
    one, as_key_heads, as_heads = (100,), (200, 56), (300, 212)
    packs = [PACKS[0], one, as_key_heads, as_heads]
    for lengths in packs:
        gradients(policy, make_pack(lengths))
    assert len(graphs) == 1
    for context in (torch.no_grad(), torch.inference_mode(), policy.adapter_off()):
        with context, torch.no_grad():
            for lengths in packs:
                policy(make_pack(lengths))
    assert len(graphs) <= 5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert policy.compiled is not None
    assert policy.compiled.problem is None
