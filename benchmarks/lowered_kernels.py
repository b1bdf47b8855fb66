"""The Triton kernels of a lowered program: machine code and what it needs of a card, and their calls.

`cubins` compiles each kernel down to machine code with the ptxas that Triton brings. `Launches` runs a program's Python
without its kernels, on tensors without memory, and notes every launch and the bytes of its arguments.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Final, final
from unittest import mock

import torch
import triton
from lowering import Card, Program, pretended
from torch._inductor.codecache import PyCodeCache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.compiler import ASTSource

from trainer.model import lora_group, lora_mlp, lora_product, thin, thin_choice

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
    return [cubin for name, source in kernels_of(program) for cubin in _cubins_of(name, source, card)]


@cache
def _cubins_of(name: str, source: str, card: Card) -> list[Cubin]:
    with pretended(card):
        ask_ptxas()
        tuner = load_kernel(name, source)
        return [_cubin(name, tuner, chosen, card) for chosen in tuner.configs]


def ask_ptxas() -> None:
    """Compile always, and let ptxas say what a kernel needs."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True


def _cubin(name: str, tuner: Any, chosen: Any, card: Card) -> Cubin:
    meta = tuner._create_compile_meta(chosen)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    said = ", ".join(f"{key}={value}" for key, value in sorted(chosen.kwargs.items())) + f" warps={chosen.num_warps}"
    return cubin_of(name, said, source, tuner._create_compile_options(chosen, meta), card)


def cubin_of(name: str, config: str, source: ASTSource, options: dict[str, Any], card: Card) -> Cubin:
    """Compile a kernel; within `pretended`, with ptxas asked for its log.

    Args:
        name: of the kernel.
        config: in words.
        source: the kernel, and what it is specialized to.
        options: of Triton's compiler.
        card: to compile for.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        binary = triton.compile(source, target=card.target, options=options)
    return read_ptxas(name, config, int(binary.metadata.shared), said.getvalue(), str(binary.asm["ptx"]))


def read_ptxas(name: str, config: str, shared_bytes: int, said: str, ptx: str) -> Cubin:
    """What a kernel needs.

    Args:
        name: of the kernel.
        config: in words.
        shared_bytes: of a thread block.
        said: by `ptxas -v`.
        ptx: the kernel.
    """
    frames = [tuple(map(int, each)) for each in _STACK.findall(said)]
    assert frames, f"{name}: ptxas said nothing of its stack: {said}"
    return Cubin(
        name,
        config,
        shared_bytes,
        max(max(stores, loads) for _, stores, loads in frames),
        max(stack for stack, _, _ in frames),
        max(map(int, _REGISTERS.findall(said))),
        next((each for each in TENSOR_CORES if each in ptx), ""),
    )


@final
@dataclass(frozen=True)
class Launch:
    """One call of a kernel or of an operator."""

    name: str
    num_bytes: int
    """Of its tensors, each once; what a Triton kernel overwrites in place is read and written."""
    is_triton: bool
    inner: tuple[Launch, ...] = ()
    """What an operator of ours launches."""

    is_base: bool = False
    """A product with a weight of the model: both of its sides are wide."""

    @property
    def kernels(self) -> tuple[Launch, ...]:
        """Those that it launches."""
        return self.inner or (self,)


RunKernel = Callable[[str, str, Sequence[Any]], None]


def run_program(program: Program, arguments: Sequence[Any] | None, run_kernel: RunKernel, device: str) -> Any:
    """Run a program's Python on tensors of another device than its own.

    Args:
        program: to run.
        arguments: of its graph; None: tensors of the traced sizes.
        run_kernel: called with name, source and arguments of each Triton kernel.
        device: of the tensors that the program makes.
    """

    class Compiler:
        def triton(self, name: str, source: str, device_str: str) -> Any:
            del device_str
            return SimpleNamespace(run=lambda *values, stream: run_kernel(name, source, values))

        def wait(self, _scope: Any) -> None: ...

    def empty(size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    source = program.source.replace("async_compile = AsyncCompile()\n", "")
    source = re.sub(r"^empty_strided_cuda = .*\n|^from torch\._C.* import .*\n", "", source, flags=re.MULTILINE)
    scope: dict[str, Any] = {
        "async_compile": Compiler(),
        "empty_strided_cuda": empty,
        "get_raw_stream": lambda _: 0,
        "copy_if_misaligned": lambda tensor: tensor,
    }
    with (
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch("torch._dynamo.testing.rand_strided", empty),
    ):
        exec(compile(source, program.kind, "exec"), scope)
        return scope["call"](list(scope["get_args"]() if arguments is None else arguments))


WIDE: Final = 256
"""Sizes of matrices above it are no ranks."""


@final
@dataclass(frozen=True)
class ThinLaunch:
    """One call of `thin.launch`."""

    name: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def thin_launches() -> Iterator[list[ThinLaunch]]:
    """Record launches of thin_kernels.py and swiglu_kernels.py instead of making them, on tensors of any device."""
    found: list[ThinLaunch] = []

    def record(name: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        found.append(ThinLaunch(name, grid, arguments, options))

    with mock.patch.object(thin, "launch", record), thin_as_on_gpu():
        yield found


@contextlib.contextmanager
def thin_as_on_gpu() -> Iterator[None]:
    """Let adapters' products on tensors of any device and type use the kernels, untested."""
    with (
        mock.patch.object(thin_choice, "_is_on_gpu", return_value=True),
        mock.patch.object(thin_choice, "_tested", return_value=thin_choice.KERNELS),
    ):
        yield


def _bytes_of(values: Any) -> int:
    """Bytes of the tensors among values, each once."""
    tensors = {id(each): each for each in tree_leaves(values) if isinstance(each, torch.Tensor)}
    return sum(map(_size, tensors.values()))


@final
class _Noting(TorchDispatchMode):
    """Notes every operator that is no view."""

    OURS: Final = {
        "trainer::lora_product": lora_product._product,
        "trainer::lora_gradients": lora_product._gradients_in_operator,
        "trainer::lora_group": lora_group._product,
        "trainer::lora_group_gradients": lora_product.joined_gradients,
        "trainer::lora_mlp": lora_mlp._forward,
        "trainer::lora_mlp_gradients": lora_mlp._backward,
    }

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and not name.startswith(
            ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach")
        ):
            inner = _Noting()
            if name in self.OURS:
                with thin_launches() as kernels, inner:
                    self.OURS[name](*args)
                inner.launches += [Launch(each.name, _bytes_of(each.arguments), True) for each in kernels]
            matrices = [
                each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and each.ndim == 2
            ]
            is_base = len(matrices) > 1 and all(min(each.shape) > WIDE for each in matrices)
            size = _bytes_of((args, kwargs, result)) + (_size(args[0]) if name.endswith("_") else 0)  # read and written
            self.launches.append(Launch(name, size, False, tuple(inner.launches), is_base))
        return result


def launches_of(program: Program) -> list[Launch]:
    """The launches of a program at the size that it was traced with."""
    noting = _Noting()

    def note(name: str, source: str, values: Sequence[Any]) -> None:
        found = re.search(rf"^def {name}\((.*?)\):", source, re.MULTILINE)
        assert found is not None
        names = [each.split(":")[0].strip() for each in found[1].split(",")]
        sizes = [
            _size(value) * (2 if each.startswith("in_out") else 1) for each, value in zip(names, values, strict=False)
        ]
        noting.launches.append(Launch(name, sum(sizes), True))

    with noting:
        run_program(program, None, note, "meta")
    return noting.launches


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
