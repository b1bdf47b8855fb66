"""The kernels of trainer/model/thin_kernels.py and swiglu_kernels.py, lowered to machine code; for scripts/lower.py.

A kernel is compiled with what Triton's launcher would specialize it to: types, pointers that are multiples of 16 bytes,
and integers of 1 or of multiples of 16.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from lowered_kernels import Cubin, ThinLaunch, ask_ptxas, cubin_of, thin_launches
from lowering import Card, pretended
from triton.compiler import ASTSource

from trainer.model import swiglu_kernels, thin, thin_kernels

TYPES: Final = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CASES: Final = ((8, 4096), (16, 4096), (32, 4096), (16, 65_536))
"""Ranks and tokens. With 65,536 tokens a layer is one part, and Triton compiles numbers of 1 apart."""
JOINED: Final = (4096, 1024, 1024)
"""Outputs of q, k and v of Llama-3.1-8B."""
WIDTH: Final = 14_336
"""Of its gated layer."""


def thin_cubins(rank: int, tokens: int, card: Card) -> list[Cubin]:
    """All kernels at the sizes of Llama-3.1-8B in bfloat16.

    Args:
        rank: of the adapters.
        tokens: of the pack.
        card: to compile for.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    ups, inner, both, down = (
        [empty(each, rank) for each in JOINED],
        empty(tokens, 2 * rank),
        empty(tokens, 2 * WIDTH),
        empty(rank, WIDTH),
    )
    pair, scalings = (empty(WIDTH, rank), empty(WIDTH, rank)), (1.0, 1.0)
    with thin_launches() as launches:
        thin.thin_gradients(empty(tokens, sum(JOINED)), empty(tokens, 3 * rank), ups, [1.0] * 3)
        thin.swiglu(both, inner, pair, down, scalings)
        thin.swiglu_gradients(empty(tokens, WIDTH), both, inner, empty(tokens, rank), pair, down, scalings)
    return [thin_cubin(launch, card) for launch in launches]


def thin_cubin(launch: ThinLaunch, card: Card) -> Cubin:
    """Compile the kernel of a launch."""
    kernel: Any = getattr(thin_kernels, launch.name, None) or getattr(swiglu_kernels, launch.name)
    options = dict(launch.options)
    build = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    types: dict[str, str] = dict.fromkeys(options, "constexpr")
    constants: dict[tuple[int], Any] = {(kernel.arg_names.index(name),): value for name, value in options.items()}
    attributes: dict[tuple[int], Any] = {}
    names = [name for name in kernel.arg_names if name not in options]
    for name, value in zip(names, launch.arguments, strict=True):
        index = (kernel.arg_names.index(name),)
        is_tensor = isinstance(value, torch.Tensor)
        types[name] = TYPES[value.dtype] if is_tensor else "i32" if isinstance(value, int) else "fp32"
        if types[name] == "i32" and value == 1:
            types[name], constants[index] = "constexpr", 1
        elif is_tensor or (types[name] == "i32" and value % 16 == 0):
            attributes[index] = [["tt.divisibility", 16]]
    config = f"rank={options['RANK']} warps={build['num_warps']}"
    with pretended(card):
        ask_ptxas()
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, attributes)
        return cubin_of(launch.name, config, source, build, card)
