"""Plain packs in compiled layers by FlashAttention-4: the choice, its test, and the operator that the layers call.

Its kernels need a GPU; `scripts/lower` compiles them without one. Here the operator runs torch's operators.
"""

from __future__ import annotations

import itertools
import re
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from compiled import CPU, PACKS, gpu_path, gradients, graphs_of, make_pack, make_policy
from tiny import tiny_model_dir

from trainer.config.recipe import LoraSettings
from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.model import compiled_layers, flash_choice
from trainer.model.attention import _bucketed
from trainer.model.batch import Batch
from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_attention import _operator, attend_flash
from trainer.model.flash_choice import PLAIN, AttentionKind, problem_of, uses_flash
from trainer.model.flash_trees import Kernels, Parts
from trainer.model.flex import FlexLayout
from trainer.model.layout import PackedLayout
from trainer.model.trees import Tree

__all__ = ["gpu_path"]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
LLAMA = AttentionKind(8, 2, 64, 64, torch.bfloat16, 0.125, None, None, False)
GEMMA = LLAMA._replace(window=100, softcap=20.0)
OSS = LLAMA._replace(window=128, has_sinks=True)


@pytest.mark.parametrize(("family", "checkpointing"), [("qwen3", False), ("gemma2", True)], ids=["qwen3", "gemma2"])
def test_values_and_gradients_are_those_of_uncompiled_layers(tmp_path, monkeypatch, family, checkpointing):
    monkeypatch.setattr(compiled_layers, "uses_flash", lambda *_: True)
    model_dir = tiny_model_dir(tmp_path / "model", family, head_dim=16)
    plain, ours = (make_policy(model_dir, LoraSettings(rank=4), checkpointing=checkpointing) for _ in range(2))
    graphs, backend = graphs_of()
    ours.compile_layers(backend)
    for lengths in PACKS:
        batch = make_pack(lengths)
        logprobs, found = gradients(ours, batch)
        expected, wanted = gradients(plain, batch)
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("flash_attention" in target for target in targets)
    assert not any("flex_attention" in target for target in targets)
    assert len(graphs) <= (5 if family == "qwen3" else 10), "gemma2 has two kinds of layers"
    assert ours.compiled is not None
    assert ours.compiled.problem is None


PROMPT = tuple(range(3, 90))


def answer(length: int, shared: int = 87) -> TokenSequence:
    tokens = PROMPT[:shared] + tuple((7 * place + length) % 100 for place in range(length))
    return TokenSequence(tokens, (False,) * shared + (True,) * length, TokenInputs())


def tree_pack() -> Batch:
    """Two prompts with answers, and a plain sequence between them."""
    trees = [
        Tree((answer(60), answer(140), answer(1)), 87),
        Tree.of_one(answer(33)),
        Tree((answer(20), answer(45)), 87),
    ]
    return Batch.pack_trees(trees, CPU)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_answers_behind_one_prompt_are_too(tmp_path, monkeypatch, family):
    """Gemma 2 has layers with a window of 4 tokens here: they attend by FlexAttention."""
    monkeypatch.setattr(compiled_layers, "uses_flash", lambda *_: True)
    model_dir = tiny_model_dir(tmp_path / "model", family, head_dim=16)
    plain, ours = (make_policy(model_dir, LoraSettings(rank=4)) for _ in range(2))
    graphs, backend = graphs_of()
    ours.compile_layers(backend)
    for batch in (make_pack(PACKS[0]), tree_pack(), make_pack(PACKS[1]), tree_pack()):
        logprobs, found = gradients(ours, batch)
        expected, wanted = gradients(plain, batch)
        torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    used = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    is_flex = [any("flex_attention" in each for each in targets) for targets in used]
    assert is_flex == [False] * 2 if family == "qwen3" else [True] * 2 + [False] * 2


def options_of(kind: AttentionKind) -> AttentionOptions:
    sinks = torch.randn(kind.heads) if kind.has_sinks else None
    return AttentionOptions(kind.scaling, kind.window, kind.softcap, sinks)


@pytest.mark.parametrize("kind", [LLAMA, GEMMA, OSS], ids=["plain", "window and soft cap", "window and sinks"])
def test_the_operator_computes_what_packed_attention_does(kind):
    layout = PackedLayout.of_lengths((130, 1, 77), CPU)
    parts, tokens = layout.parts(), layout.num_tokens
    assert parts is not None
    sizes = ((kind.heads, kind.width), (kind.kv_heads, kind.width), (kind.kv_heads, kind.value_width))
    given = [torch.randn(1, heads, tokens, width, requires_grad=True) for heads, width in sizes]
    query, key, value = given
    options = options_of(kind)
    ours = attend_flash(query, key, value, parts, options)
    wanted = _bucketed(query, key, value, layout, options)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, given, grad), torch.autograd.grad(wanted, given, grad), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LLAMA, OSS], ids=["branches", "sinks"])
def test_the_operator_keeps_the_rules_of_operators(kind):
    options = options_of(kind)
    given = [torch.randn(9, heads, 16, requires_grad=True) for heads in (kind.heads, kind.kv_heads, kind.kv_heads)]
    sinks = None if options.sinks is None else options.sinks.requires_grad_()
    parts = Parts.of([(3, ()), (2, (3, 1))] if sinks is None else [(5, ()), (4, ())], 0)
    tensors = [each for each in parts if each is not None]
    torch.library.opcheck(_operator, (*given, tensors, [0.25, float(kind.window or 0), 0.0], sinks))


def listed(parts: Parts | None) -> list[list[int]]:
    assert parts is not None
    return [each.tolist() for each in parts if each is not None]


def test_parts_of_a_pack():
    layout = PackedLayout.of_trees([(4, ()), (3, ())], CPU, padding=2)
    assert listed(layout.parts()) == [[0, 4, 7, 9]]
    assert listed(layout.parts(3)) == [[0, 4, 7, 12]]
    trees = PackedLayout.of_trees([(2, ()), (3, (1, 2)), (1, (2,))], CPU)
    assert listed(trees.parts(2)) == [
        [0, 2, 5, 6, 8, 9, 11, 13],
        [5, 6, 7, 9, 10],
        [0, 3, 5],
        [2, 3, 4, 8],
        [0, 3, 4],
    ]
    assert {each.dtype for each in trees.parts() or () if each is not None} == {torch.int32, torch.int64}
    assert PackedLayout.of_trees([(4, (1, 2))], CPU, forks=[(4, 2)]).parts() is None


@pytest.mark.parametrize(
    ("trees", "kind", "is_flash"),
    [
        ([(90, ())], OSS, True),
        ([(90, ())], GEMMA, True),
        ([(50, (30, 40))], LLAMA, True),
        ([(50, (30, 50))], GEMMA, True),
        ([(50, (30, 51))], GEMMA, False),
        ([(50, (30, 40))], OSS, False),
    ],
    ids=["sinks", "window", "branches", "a window that nothing leaves", "a window", "branches and sinks"],
)
def test_what_branches_need(trees, kind, is_flash):
    layout = PackedLayout.of_trees(trees, CPU)
    found = FlexLayout.of(layout, {LLAMA, kind}, -layout.num_tokens % 128, uses_flash=True)
    assert (found.parts is not None, found.masks == {}) == (is_flash, is_flash)


@pytest.mark.parametrize("kind", [LLAMA, GEMMA, OSS], ids=["plain", "window and soft cap", "window and sinks"])
def test_right_kernels_pass_the_test(kind):
    assert problem_of(PLAIN, CPU, kind, 2) is None


def wrong_in(launch: int, factor: float) -> Kernels:
    """Kernels of which one launch of the backward pass gives a wrong gradient of keys."""
    calls = itertools.count()

    def racing(*arguments: Any) -> Any:
        grad_query, grad_key, *rest = PLAIN.gradients(*arguments)
        return grad_query, grad_key * (factor if next(calls) == launch else 1.0), *rest

    return PLAIN._replace(gradients=racing)


def test_one_wrong_launch_of_many_is_found():
    assert problem_of(wrong_in(6, 1.0), CPU, LLAMA, 8) is None
    found = str(problem_of(wrong_in(6, 1.1), CPU, LLAMA, 8))
    assert re.search(r"of keys differs by (9\..e-02|1\..e-01) of its largest value in 8 launches", found), found
    assert "of keys differs by inf" in str(problem_of(wrong_in(6, float("nan")), CPU, LLAMA, 8))


def test_a_kernel_that_raises_is_not_used():
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such tile\nand more")

    assert problem_of(PLAIN._replace(forward=refuse), CPU, LLAMA, 1) == "RuntimeError: no such tile"
    assert "16 bits only" in str(problem_of(PLAIN, CPU, LLAMA._replace(dtype=torch.float32), 1))


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("installed", "said"),
    [(None, r'not installed: pip install "tunesmith\[flash\]"'), ("4.0.0b30", "4.0.0b30 is installed, and 4.0.0b36")],
)
def test_why_the_package_is_not_used_is_said(monkeypatch, installed, said):
    def version(_name: str) -> str:
        if installed is None:
            raise PackageNotFoundError
        return installed

    monkeypatch.setattr(flash_choice, "version", version)
    flash_choice._problem_on.cache_clear()
    with pytest.warns(RuntimeWarning, match=said):
        assert not uses_flash({LLAMA}, GPU)
    flash_choice._problem_on.cache_clear()


def test_it_is_never_used_on_a_cpu_or_where_bits_must_be_equal(monkeypatch):
    monkeypatch.setattr(flash_choice, "_problem_on", lambda *_: None)
    assert uses_flash({LLAMA}, GPU)
    assert not uses_flash({LLAMA}, CPU)
    torch.use_deterministic_algorithms(True)
    try:
        assert not uses_flash({LLAMA}, GPU)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_with_a_window_is_tested_without_it_too(monkeypatch):
    """Branches attend to their prefix so where they do not leave the window; those of sinks never do."""
    tested: list[AttentionKind] = []
    monkeypatch.setattr(flash_choice, "_problem_on", lambda _device, kind: tested.append(kind))
    assert uses_flash({GEMMA, OSS}, GPU)
    assert set(tested) == {GEMMA, GEMMA._replace(window=None), OSS}
