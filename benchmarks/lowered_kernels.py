"""The Triton kernels of a lowered program: machine code and what it needs of a card, and their calls.

`cubins` compiles each kernel down to machine code with the ptxas that Triton brings. `Launches` runs a program's Python
without its kernels, on tensors without memory, and notes every launch and the bytes of its arguments.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, final
from unittest import mock

import torch
import triton
from lowering import Card, Program, pretended
from torch._inductor.codecache import PyCodeCache
from triton.compiler import ASTSource

_KERNEL: Final = re.compile(r"(\w+) = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
_STACK: Final = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS: Final = re.compile(r"Used (\d+) registers")
TENSOR_CORES: Final = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
"""Instructions of matrix products: Hopper, Blackwell, any."""


@final
@dataclass(frozen=True)
class Cubin:
    """What ptxas said of one kernel in one of the configurations that Inductor chooses from."""

    kernel: str
    config: str
    shared_bytes: int
    spilled_bytes: int
    """Stored to local memory for want of registers."""
    stack_bytes: int
    registers: int
    tensor_cores: str
    """Of `TENSOR_CORES`; empty if the kernel multiplies no matrices."""


def kernels_of(program: Program) -> list[tuple[str, str]]:
    """Name and source of each Triton kernel."""
    return [(name, source) for _, name, source in _KERNEL.findall(program.source)]


def load_kernel(name: str, source: str) -> Any:
    """Inductor's autotuner of a kernel."""
    return getattr(PyCodeCache.load(source), name)


def cubins(program: Program, card: Card) -> list[Cubin]:
    """Compile every kernel of a program, in every configuration, to machine code of the card."""
    found = []
    with pretended(card):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        for name, source in kernels_of(program):
            tuner = load_kernel(name, source)
            for chosen in tuner.configs:
                found.append(_cubin(name, tuner, chosen, card))
    return found


def _cubin(name: str, tuner: Any, chosen: Any, card: Card) -> Cubin:
    meta = tuner._create_compile_meta(chosen)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        binary = triton.compile(
            ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
            target=card.target,
            options=tuner._create_compile_options(chosen, meta),
        )
    frames = [tuple(map(int, each)) for each in _STACK.findall(said.getvalue())]
    registers = [int(each) for each in _REGISTERS.findall(said.getvalue())]
    assert frames, f"{name}: ptxas said nothing of its stack: {said.getvalue()}"
    ptx = str(binary.asm["ptx"])
    return Cubin(
        name,
        ", ".join(f"{key}={value}" for key, value in sorted(chosen.kwargs.items())) + f" warps={chosen.num_warps}",
        int(binary.metadata.shared),
        max(max(stores, loads) for _, stores, loads in frames),
        max(stack for stack, _, _ in frames),
        max(registers),
        next((each for each in TENSOR_CORES if each in ptx), ""),
    )


@final
@dataclass(frozen=True)
class Launch:
    """One call of a kernel or of an operator."""

    name: str
    num_bytes: int
    """Of its tensors, each once; twice what it reads and overwrites."""
    is_triton: bool


RunKernel = Callable[[str, str, Sequence[Any]], None]


def run_program(program: Program, arguments: Sequence[Any], run_kernel: RunKernel, device: str) -> Any:
    """Run a program's Python on tensors of another device than its own.

    Args:
        program: to run.
        arguments: of its graph.
        run_kernel: called with name, source and arguments of each Triton kernel.
        device: of the tensors that the program makes.
    """

    class Compiler:
        def triton(self, name: str, source: str, device_str: str) -> Any:
            del device_str
            return SimpleNamespace(run=lambda *values, stream: run_kernel(name, source, values))

        def wait(self, _scope: Any) -> None: ...

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    source = program.source.replace("empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda\n", "")
    source = source.replace("async_compile = AsyncCompile()\n", "")
    for line in re.findall(r"^from torch\._C import .*$|^from torch\._C\._dynamo\.guards import .*$", source, re.MULTILINE):
        source = source.replace(line + "\n", "")
    scope: dict[str, Any] = {
        "async_compile": Compiler(),
        "empty_strided_cuda": empty,
        "get_raw_stream": lambda _: 0,
        "copy_if_misaligned": lambda tensor: tensor,
    }
    with (
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device", lambda _: None),
    ):
        exec(compile(source, program.kind, "exec"), scope)  # noqa: S102
        return scope["call"](list(arguments))
