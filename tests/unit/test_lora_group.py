"""One product for q, k and v, and one for gate and up: the values and gradients of each layer's own product.

The compiler's path is traced on CPU tensors, as in test_compiled_layers.py, whose tests use groups too.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import PACKS, gpu_path, gradients, graphs_of, make_pack, make_policy
from tiny import tiny_model_dir
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.recipe import LoraSettings
from trainer.model import lora_group
from trainer.model.lora_group import GroupSearch, ProductGroup, _group_gradients, _group_operator, group_product
from trainer.model.lora_linear import FusedLinear
from trainer.model.lora_product import LoraProduct, joined_gradients
from trainer.model.policy import Policy

__all__ = ["gpu_path"]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
WIDTHS, RANKS, SCALINGS, WIDTH = (12, 4, 8), (3, 1, 2), (0.5, 2.0, 1.0), 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2", head_dim=16)


def made(*, with_bias: bool, is_joined: bool = True) -> dict[str, Any]:
    """Inputs of three layers; the base weights are one matrix, or one of each layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, bias = normal(2, 5, WIDTH), normal(sum(WIDTHS), WIDTH), normal(sum(WIDTHS))
    return {
        "x": x.requires_grad_(),
        "weights": [weight] if is_joined else [part.clone() for part in weight.split(WIDTHS)],
        "biases": [] if not with_bias else [bias] if is_joined else [part.clone() for part in bias.split(WIDTHS)],
        "downs": [normal(rank, WIDTH).requires_grad_() for rank in RANKS],
        "ups": [normal(width, rank).requires_grad_() for width, rank in zip(WIDTHS, RANKS, strict=True)],
    }


def apart(x: torch.Tensor, weights: Any, biases: Any, downs: Any, ups: Any) -> list[torch.Tensor]:
    of_layers = torch.cat(weights).split(WIDTHS)
    of_biases = torch.cat(biases).split(WIDTHS) if biases else [None] * len(WIDTHS)
    parts = zip(of_layers, of_biases, downs, ups, SCALINGS, strict=True)
    return [LoraProduct.apply(x, *part) for part in parts]


@pytest.mark.parametrize("is_joined", [True, False], ids=["joined", "listed"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_values_and_gradients_are_those_of_products_apart(with_bias, is_joined):
    inputs = made(with_bias=with_bias, is_joined=is_joined)
    leaves = [inputs["x"], *inputs["downs"], *inputs["ups"]]
    ours, theirs = group_product(**inputs, scalings=SCALINGS), apart(**inputs)
    factors = [torch.randn_like(each) for each in theirs]
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(torch.cat([(y * f).flatten() for y, f in zip(each, factors, strict=True)]).sum(), leaves)
        for each in (ours, theirs)
    )
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_joined", [True, False], ids=["joined", "listed"])
def test_the_operators_tell_the_compiler_what_they_return(is_joined):
    inputs = made(with_bias=True, is_joined=is_joined)
    ups = [up.detach().requires_grad_() for up in inputs["ups"]]
    down = torch.cat([each.detach() for each in inputs["downs"]]).requires_grad_()
    arguments = (inputs["x"], inputs["weights"], inputs["biases"], down, ups, list(SCALINGS))
    checked = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_group_operator, arguments, test_utils=checked)
    x, inner = inputs["x"].detach(), torch.randn(10, sum(RANKS), dtype=torch.float64)
    grad = torch.randn(2, 5, sum(WIDTHS), dtype=torch.float64)
    plain = [up.detach() for up in ups]
    for needs_x in (True, False):
        of_backward = (grad, x, inner, inputs["weights"], down.detach(), plain, list(SCALINGS), needs_x)
        torch.library.opcheck(_group_gradients, of_backward, test_utils=("test_schema", "test_faketensor"))


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        """Matrix products."""
        return self.names["mm"] + self.names["addmm"] + self.names["addmm_"]


def test_fewer_products_read_x_and_write_its_gradient():
    """Of three layers, 2 products read x instead of 6, and one accumulation instead of three and their sum."""
    inputs = made(with_bias=False)
    x, weights, down = inputs["x"].detach(), inputs["weights"], torch.cat(inputs["downs"]).detach()
    ups = [up.detach() for up in inputs["ups"]]
    with _Counted() as forward:
        y, inner = lora_group._product(x, weights, [], down, ups, list(SCALINGS))
    assert forward.products == 2 + 3  # A, W; B of each layer
    with _Counted() as backward:
        joined_gradients(y, x, inner, weights, down, ups, list(SCALINGS), True)
    assert backward.products == 2 * 3 + 3  # B^T and the gradient of B of each layer; W^T, A^T, the gradient of A
    assert backward.names["cat"] == backward.names["add"] == backward.names["clone"] == 0
    each = [part.clone() for part in weights[0].split(WIDTHS)]
    with _Counted() as forward:
        y, inner = lora_group._product(x, each, [], down, ups, list(SCALINGS))
    assert forward.products == 1 + 3 + 3  # A; W and B of each layer
    with _Counted() as backward:
        joined_gradients(y, x, inner, each, down, ups, list(SCALINGS), True)
    assert backward.products == 2 * 3 + 3 + 2  # W^T of each layer, accumulated
    for counted in (forward, backward):
        assert not counted.names["cat"] + counted.names["add"] + counted.names["clone"] + counted.names["copy_"]
    with _Counted() as forward:
        outputs = apart(**inputs)
    assert forward.products == 3 * 3
    total = torch.stack([each.sum() for each in outputs]).sum()
    with _Counted() as backward:
        torch.autograd.grad(total, [inputs["x"], *inputs["downs"], *inputs["ups"]])
    assert backward.products == 5 * 3
    assert backward.names["add"] + backward.names["add_"] == 2


def compiled_policy(model_dir: Path) -> tuple[Policy, list[Any]]:
    """A policy whose layers were compiled, and the graphs; its second pass is the first of compiled layers."""
    policy = make_policy(model_dir, LoraSettings(rank=4))
    graphs, backend = graphs_of()
    policy.compile_layers(backend)
    for lengths in PACKS[:2]:
        gradients(policy, make_pack(lengths))
    return policy, graphs


def names_of(policy: Policy, groups: list[ProductGroup]) -> list[tuple[str, ...]]:
    names = {id(module): name.rpartition(".")[2] for name, module in policy.causal_lm.named_modules()}
    return sorted({tuple(names[id(member)] for member in group.members) for group in groups})


def found_in(policy: Policy) -> list[tuple[str, ...]]:
    """The groups that a pass shows, without compiling anything."""
    search = GroupSearch([module for module in policy.causal_lm.modules() if hasattr(module, "self_attn")])
    policy(make_pack((12, 5)))
    groups = search.finish()
    assert len(groups) == 2 * len(names_of(policy, groups)), "in each of two layers"
    return names_of(policy, groups)


def assert_close(ours: Any, theirs: Any) -> None:
    (logprobs, found), (expected, wanted) = ours, theirs
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.heavy
def test_compiled_layers_compute_what_they_did(tmp_path):
    """qwen2: q, k and v have biases. The base weights are views, so that neither memory nor a name changes."""
    model_dir = tiny_model_dir(tmp_path / "model", "qwen2", head_dim=16)
    policy, graphs = compiled_policy(model_dir)
    plain = make_policy(model_dir, LoraSettings(rank=4))
    assert policy.compiled is not None
    assert names_of(policy, policy.compiled.groups) == [("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")]
    assert policy.compiled.problem is None
    assert len(graphs) == 1, "two layers share a graph"
    shapes = [node.meta["example_value"].shape for node in graphs[0].graph.nodes if node.op == "placeholder"
              and isinstance(node.meta.get("example_value"), torch.Tensor)]  # fmt: skip
    widths = {len(weight) for group in policy.compiled.groups for weight in group.weights}
    joined = [shape for shape in shapes if len(shape) == 2 and shape[0] in widths]
    assert len(joined) == 2
    assert all(isinstance(size, int) for shape in joined for size in shape), "weights have one shape"

    pack = make_pack(PACKS[1])
    expected = gradients(plain, pack)
    assert_close(gradients(policy, pack), expected)
    with torch.no_grad(), policy.adapter_off(), plain.adapter_off():  # the reference
        torch.testing.assert_close(policy(pack).logprobs, plain(pack).logprobs, rtol=1e-4, atol=1e-5)

    ours, theirs = policy.causal_lm.state_dict(), plain.causal_lm.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert list(policy.trained_parameters()) == list(plain.trained_parameters())
    for group in policy.compiled.groups:
        storages = {member.base_layer.weight.untyped_storage().data_ptr() for member in group.members}
        assert storages == {weight.untyped_storage().data_ptr() for weight in group.weights}
    for name, each in (("ours", policy), ("theirs", plain)):
        (tmp_path / name).mkdir()
        each.save(tmp_path / name, each.trained_parameters())
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert written[0] == written[1]

    policy._run_uncompiled()  # each layer computes its own product again, to the bit
    logprobs, found = gradients(policy, pack)
    assert torch.equal(logprobs, expected[0])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected[1].items())


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_other_families_compute_what_they_did(tmp_path, family):
    model_dir = tiny_model_dir(tmp_path / "model", family, head_dim=16)
    policy, _ = compiled_policy(model_dir)
    plain = make_policy(model_dir, LoraSettings(rank=4))
    assert policy.compiled is not None
    assert len(names_of(policy, policy.compiled.groups)) == 2
    for lengths in PACKS:
        assert_close(gradients(policy, make_pack(lengths)), gradients(plain, make_pack(lengths)))


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        (["q_proj", "v_proj"], []),
        (["q_proj", "k_proj", "v_proj", "up_proj"], [("q_proj", "k_proj", "v_proj")]),
        (["gate_proj", "up_proj"], [("gate_proj", "up_proj")]),
    ],
)
def test_layers_without_an_adapter_are_not_joined(model_dir, targets, groups):
    assert found_in(make_policy(model_dir, LoraSettings(rank=4, target_modules=targets))) == groups


def test_layers_that_read_different_inputs_are_not_joined(model_dir):
    policy = make_policy(model_dir, LoraSettings(rank=4))
    for module in policy.causal_lm.modules():
        if isinstance(getattr(module, "k_proj", None), FusedLinear):
            module.k_proj.register_forward_pre_hook(lambda _module, inputs: (inputs[0].clone(),))
    assert found_in(policy) == [("gate_proj", "up_proj")]


def test_layers_with_and_without_bias_are_not_joined(model_dir):
    policy = make_policy(model_dir, LoraSettings(rank=4))
    for module in policy.causal_lm.modules():
        if isinstance(getattr(module, "k_proj", None), FusedLinear):
            module.k_proj.base_layer.bias = None
    assert found_in(policy) == [("gate_proj", "up_proj")]


def test_full_parameters_have_no_groups(model_dir):
    assert found_in(make_policy(model_dir, None)) == []


def test_uncompiled_layers_of_a_group_compute_their_own_products(model_dir):
    """Sampling and packs of several adapters run uncompiled."""
    policy, plain = (make_policy(model_dir, LoraSettings(rank=4)) for _ in range(2))
    assert len(found_in(policy)) == 2
    (logprobs, found), (expected, wanted) = (gradients(each, make_pack((30, 9))) for each in (policy, plain))
    assert torch.equal(logprobs, expected)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
