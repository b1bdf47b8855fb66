"""Run lowered programs on CPU tensors, their kernels in Triton's interpreter; for tests/unit/test_lowering.py.

The interpreter executes a kernel's Python, one program of the grid after another, with numpy. It knows no functions of
libdevice, CUDA's library of mathematics: `Libdevice` computes those by the formulas of its docstrings. bfloat16 is not
computed correctly by the interpreter of Triton 3.7.1, so float32 and float16 are used.

The environment must have TRITON_INTERPRET=1 before Triton is imported.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Final
from unittest import mock

import torch
import triton
import triton.language as tl
from lowered_kernels import load_kernel, run_program, thin_as_on_gpu
from lowered_layers import first_pass_as_on_gpu, pack_of
from lowering import CARDS, Card, Program, flex_as_on_gpu, gpu_backend, pretended
from torch._inductor.runtime.triton_heuristics import GridExpr
from transformers import AutoConfig

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.model import thin, thin_choice
from trainer.model.attention import packed_attention
from trainer.model.base_model import empty_model
from trainer.model.eager_attention import AttentionOptions
from trainer.model.flex import block_mask_of, flex_packed, prepare_compiler
from trainer.model.layout import PackedLayout
from trainer.model.policy import make_policy

Trees = tuple[tuple[int, tuple[int, ...]], ...]
IMPORT: Final = "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"


class libdevice:  # noqa: N801  # as the kernels call it
    """The functions of libdevice that our kernels call."""

    @staticmethod
    @triton.jit
    def rsqrt(x):  # type: ignore[no-untyped-def]
        """1 / sqrt(x)."""
        return tl.rsqrt(x)

    @staticmethod
    @triton.jit
    def tanh(x):  # type: ignore[no-untyped-def]
        """2 / (1 + exp(-2 x)) - 1."""
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

    @staticmethod
    @triton.jit
    def mul_rn(x, y):  # type: ignore[no-untyped-def]
        """The product x y, which the compiler must not join with a sum."""
        return x * y

    @staticmethod
    @triton.jit
    def exp(x):  # type: ignore[no-untyped-def]
        """e^x."""
        return tl.exp(x)

    @staticmethod
    @triton.jit
    def exp2(x):  # type: ignore[no-untyped-def]
        """2^x."""
        return tl.exp2(x)

    @staticmethod
    @triton.jit
    def log2(x):  # type: ignore[no-untyped-def]
        """The logarithm to base 2."""
        return tl.log2(x)


@cache
def _loaded(name: str, source: str, card: Card) -> Any:
    assert IMPORT in source
    with pretended(card):
        return load_kernel(name, source.replace(IMPORT, IMPORT + "from interpreted import libdevice\n"))


def interpret(card: Card, name: str, source: str, values: Sequence[Any]) -> None:
    """Run one kernel, in the configuration of the largest blocks: the interpreter's time is that of the grid.

    Args:
        card: that the program was lowered for.
        name: of the kernel.
        source: of the kernel.
        values: of its arguments, then of its grid where Inductor passes it.
    """
    tuner = _loaded(name, source, card)
    chosen = max(tuner.configs, key=lambda each: math.prod(each.kwargs.values()))
    names = [each for each in tuner.fn.arg_names if each not in chosen.kwargs]
    given = dict(zip(names, values, strict=False))
    launcher = dict(zip(tuner.inductor_meta.get("extra_launcher_args", ()), values[len(names) :], strict=True))
    grid = GridExpr.from_meta(tuner.inductor_meta, chosen).eval_slow({**given, **launcher, **chosen.kwargs})
    tuner.fn[grid](**given, **chosen.kwargs)


def interpreting_backend(card_name: str, kept: list[Program]) -> Callable[..., Any]:
    """A backend of torch.compile that lowers for a card and runs the programs in the interpreter.

    Args:
        card_name: of `CARDS`.
        kept: where the programs are appended.
    """
    card = CARDS[card_name]

    def run(program: Program) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.no_grad():
                return run_program(program, arguments, partial(interpret, card), "cpu")

        return call

    return gpu_backend(card, kept, run)


CPU: Final = torch.device("cpu")
HEADS: Final = (2, 1)
WIDTH: Final = 16
PLAIN: Final[Trees] = ((200, ()), (56, ()))
CASES: Final[dict[str, tuple[tuple[Trees, ...], dict[str, Any]]]] = {
    "plain": ((PLAIN,), {}),
    "window": ((PLAIN,), {"sliding_window": 50}),
    "cap": ((PLAIN,), {"softcap": 1.5}),
    "sinks": ((PLAIN,), {"s_aux": (-1.0, 0.5)}),
    "tree": ((((130, (40, 60)), (26, ())),), {}),
    "unpadded": ((((150, ()), (57, ())),), {"sliding_window": 50, "softcap": 1.5}),
    "short": ((((12, ()), (12, ())),), {}),
    "changing": ((((384, ()),), PLAIN, ((9, ()),) * 28 + ((4, ()),), ((130, (40, 60)), (26, ()))), {}),
}
"""Packs that one compiled function gets in turn, and the form of attention.

The last one is what gave NaN in pytorch#186775: `dynamic=True` and a block mask that differs at each call. Its first
pack has more blocks than there are heads, since equal numbers would share a symbol, and be compiled apart.
"""


def attention_differences(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference to the CPU's float32 attention, over its largest value, of output and gradients.

    Args:
        name: of `CASES`.
        dtype: of queries, keys and values.
    """
    torch._dynamo.reset()
    prepare_compiler()
    packs, form = CASES[name]
    kept: list[Program] = []
    compiled = torch.compile(flex_packed, fullgraph=True, dynamic=True, backend=interpreting_backend("sm_90", kept))
    found = [_attention_differences(compiled, trees, form, dtype) for trees in packs]
    assert [program.kind for program in kept] == ["forward", "backward"], "one graph for all packs"
    return {part: max(each[part] for each in found) for part in found[0]}


def _attention_differences(
    compiled: Callable[..., Any], trees: Trees, form: dict[str, Any], dtype: torch.dtype
) -> dict[str, float]:
    layout = PackedLayout.of_trees(trees, CPU)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, layout.num_tokens, WIDTH, generator=generator).to(dtype)
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    ]
    factor = torch.randn(1, layout.num_tokens, HEADS[0], WIDTH, generator=generator)
    if "s_aux" in form:
        form = {**form, "s_aux": torch.tensor(form["s_aux"])}
    options = AttentionOptions(WIDTH**-0.5, form.get("sliding_window"), form.get("softcap"), form.get("s_aux"))
    ours, exact = ([each.detach().to(kind).requires_grad_() for each in inputs] for kind in (dtype, torch.float32))
    with flex_as_on_gpu():
        mine = compiled(*ours, block_mask_of(layout, options.window), options)
        found = [mine, *torch.autograd.grad((mine.float() * factor).sum(), ours)]
    theirs, _ = packed_attention(torch.nn.Module(), *exact, None, packed=layout, **form)
    wanted = [theirs, *torch.autograd.grad((theirs * factor).sum(), exact)]
    return dict(zip(("output", "dQ", "dK", "dV"), map(_difference, found, wanted), strict=True))


def layer_differences(model_type: str, lora: LoraSettings | None) -> dict[str, float]:
    """The same of a policy of one layer with float32 weights: logprobs, and the gradient of every trained parameter.

    Args:
        model_type: of transformers.
        lora: the adapter; None trains every parameter.
    """
    torch._dynamo.reset()
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=HEADS[0],
        num_key_value_heads=HEADS[1], head_dim=WIDTH, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    batch = pack_of([200, 56])
    found = []
    for is_interpreted in (False, True):
        torch.manual_seed(0)
        causal_lm = empty_model(config, torch.float32).requires_grad_(False)
        policy = make_policy(causal_lm.eval(), ModelSettings(path="none", compute_dtype="float32"), lora, 0)
        with torch.no_grad():
            for parameter in policy.trained_parameters().values():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        kept: list[Program] = []
        if is_interpreted:
            policy.compile_layers(interpreting_backend("sm_90", kept))
        kernels = thin_as_on_gpu() if is_interpreted else nullcontext()
        launched = mock.patch.object(thin, "launch", wraps=thin.launch)
        with flex_as_on_gpu(), first_pass_as_on_gpu(), kernels, launched as launch:
            if is_interpreted:
                policy(pack_of([300]))
            scores = policy.train()(batch)
            parameters = policy.trained_parameters()
            gradients = torch.autograd.grad(scores.logprobs.sum(), list(parameters.values()))
        found.append({"logprobs": scores.logprobs.detach(), **dict(zip(parameters, gradients, strict=True))})
        assert [program.kind for program in kept] == (["forward", "backward"] if is_interpreted else [])
        assert launch.called == (is_interpreted and lora is not None), "adapters' products are kernels"
    return {name: _difference(found[1][name], found[0][name]) for name in found[0]}


def adapter_differences(dtype: torch.dtype, rank: int) -> dict[str, float]:
    """Largest differences of the kernels of adapters' products to torch's operators in float32.

    Args:
        dtype: of all tensors.
        rank: of the adapters.
    """
    found = thin_choice.differences(thin_choice.KERNELS, CPU, dtype, rank, launches=2)
    return {name: math.inf if worst is None else worst for name, worst in found}


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    distance = float((found.detach().float() - wanted.detach()).abs().max() / wanted.detach().abs().max())
    return distance if math.isfinite(distance) else math.inf  # max() would lose a NaN


def main() -> None:
    """Write the differences of the named cases as JSON: `plain.float16`, `layer.llama.full`, `adapters.float32.16`."""
    found = {}
    for case in sys.argv[1:]:
        kind, *rest = case.split(".")
        if kind == "layer":
            found[case] = layer_differences(rest[0], None if rest[1:] else LoraSettings(rank=4))
        elif kind == "adapters":
            found[case] = adapter_differences(getattr(torch, rest[0]), int(rest[1]))
        else:
            found[case] = attention_differences(kind, getattr(torch, rest[0]))
        sys.stderr.write(f"{case}: {max(found[case].values()):.1e}\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
