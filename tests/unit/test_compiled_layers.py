"""Compiled layers compute what uncompiled ones do, from one graph for packs of any length.

The GPU's path is traced here on CPU tensors: the compiler's back end runs its graphs as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model import attention, flex
from trainer.model.base_model import load_base
from trainer.model.batch import Batch
from trainer.model.compiled_layers import is_compilable
from trainer.model.policy import Policy, load_policy

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
PACKS = [(40, 7), (200, 90, 30), (12,), (140, 150, 61, 9)]


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch):
    """Compiled layers attend as on a GPU, which torch does on a CPU but for its check of devices."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    on_cpu = attention._bucketed

    def with_mask(query, key, value, layout, options):
        flex.block_mask_of(layout, options.window)  # the first pass on a GPU makes it
        return on_cpu(query, key, value, layout, options)

    monkeypatch.setattr(attention, "_bucketed", with_mask)
    yield
    torch._dynamo.reset()


def graphs_of() -> tuple[list[Any], Any]:
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return graphs, keep


def make_policy(model_dir: Path, lora: LoraSettings | None, *, checkpointing: bool = False) -> Policy:
    policy = load_policy(
        ModelSettings(path=str(model_dir), compute_dtype="float32", gradient_checkpointing=checkpointing), lora, 0, CPU
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def make_pack(lengths: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        tokens = tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        rows.append(
            TokenSequence(tokens, (False,) + (True,) * (length - 1), TokenInputs(weights=(1.0,) * (length - 1)))
        )
    return Batch.pack(rows, CPU)


def gradients(policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.train()
    scores = policy(batch)
    parameters = policy.trained_parameters()
    found = torch.autograd.grad(scores.logprobs.sum(), list(parameters.values()))
    policy.eval()
    return scores.logprobs.detach(), dict(zip(parameters, found, strict=True))


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
    # q, k and v are one, and gate and up: the others are those of o and down
    assert sum("lora_group" in target for target in targets) == 2
    assert sum("lora_product" in target for target in targets) == 2
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
