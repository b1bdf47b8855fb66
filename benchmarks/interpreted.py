"""Run lowered programs on CPU tensors, their kernels in Triton's interpreter; for scripts/interpret.py.

The interpreter executes a kernel's Python, one program of the grid after another, with numpy. It knows no functions of
libdevice, CUDA's library of mathematics: `Libdevice` computes those by the formulas of its docstrings. bfloat16 is not
computed correctly by the interpreter of Triton 3.7.1, so float32 and float16 are used.

The environment must have TRITON_INTERPRET=1 before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any, Final

import torch
import triton
import triton.language as tl
from lowered_kernels import load_kernel, run_program
from lowering import CARDS, Card, Program, gpu_backend, pretended
from torch._inductor.runtime.triton_heuristics import GridExpr

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
    def exp(x):  # type: ignore[no-untyped-def]
        """e^x."""
        return tl.exp(x)

    @staticmethod
    @triton.jit
    def log(x):  # type: ignore[no-untyped-def]
        """The natural logarithm."""
        return tl.log(x)


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
    chosen = max(tuner.configs, key=lambda each: prod(each.kwargs.values()))
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
