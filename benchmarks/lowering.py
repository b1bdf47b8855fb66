"""Lower compiled functions to a GPU's Triton source without a GPU; for scripts/lower.py and its tests.

Autograd on fake CUDA tensors aborts a CPU build of torch, so a function is traced on CPU tensors (real or fake), as
torch.compile does it, and each graph is relabelled: its tensors become fake CUDA tensors. Inductor then writes the code
that it writes on the GPU: it asks for the properties of the device only, and those are in `CARDS`.

Importing this module replaces Triton's driver, and Inductor keeps what it learns of the device: use it in a process of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final, final
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.nn.attention import flex_attention as flex_attention_module
from torch.utils import _triton
from triton.backends.compiler import GPUTarget

CUDA: Final = torch.device("cuda", 0)


@final
@dataclass(frozen=True)
class Card:
    """What Inductor and Triton ask of a GPU."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    """Shared memory that a thread block can have."""

    @property
    def arch(self) -> int:
        """90 for sm_90."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def target(self) -> GPUTarget:
        """Of Triton's compiler."""
        return GPUTarget("cuda", self.arch, 32)

    @property
    def properties(self) -> SimpleNamespace:
        """As torch.cuda.get_device_properties."""
        return SimpleNamespace(
            name=f"sm_{self.arch}",
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.processors,
            regs_per_multiprocessor=65_536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
            total_memory=80 << 30,
            shared_memory_per_block=49_152,
            shared_memory_per_block_optin=self.shared_bytes,
            shared_memory_per_multiprocessor=self.shared_bytes + 1024,
            gcnArchName="",
        )


CARDS: Final = {
    "sm_80": Card((8, 0), 108, 166_912),
    "sm_90": Card((9, 0), 132, 232_448),
    "sm_100": Card((10, 0), 148, 232_448),
}
"""A100, H100 and B200. Bytes: CUDA C++ programming guide, compute capabilities, shared memory per thread block."""


@final
@dataclass(frozen=True)
class Program:
    """What Inductor wrote of one graph."""

    kind: str
    """forward, backward or inference."""
    source: str
    """Python, with the source of the Triton kernels."""
    num_bytes: int
    """Read and written by its operators at the traced size, each argument once."""
    bytes_of: tuple[tuple[str, int], ...]
    """The same by operator."""
    operators: tuple[str, ...] = field(default=())
    """Targets of the graph's calls."""


@final
class _Driver:
    """The driver of a card that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


@contextmanager
def pretended(card: Card) -> Iterator[None]:
    """Let torch answer for this card within the block."""
    triton.runtime.driver.set_active(_Driver(card.target))
    _triton.has_triton.cache_clear()
    properties = card.properties
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(torch.version, "cuda", "13.0")
        replace(triton_helpers, "set_driver_to_gpu", lambda: None)
        replace(fake_tensor, "init_gpu_context", lambda *_: None)
        replace(FakeTensor, "copy_", lambda tensor, *_, **__: tensor)  # its device guard needs CUDA
        for owner in (CudaInterface, CudaInterface.Worker):
            replace(owner, "get_device_properties", staticmethod(lambda *_: properties))
            replace(owner, "current_device", staticmethod(lambda: 0))
        replace(CudaInterface, "get_compute_capability", staticmethod(lambda *_: card.arch))
        replace(CudaInterface, "is_available", staticmethod(lambda: True))
        for name, value in {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": properties,
            "get_device_capability": card.capability,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
            "get_rng_state": torch.zeros(1),
            "set_rng_state": None,
        }.items():
            replace(torch.cuda, name, lambda *_, answer=value, **__: answer)
        yield
    _triton.has_triton.cache_clear()


class _Relabelling:
    """Turns the CPU tensors and devices of a graph into fake CUDA tensors and the CUDA device."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[FakeTensor, FakeTensor]] = {}

    def value(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            if id(value) not in self._made:
                with value.fake_mode, torch.no_grad():
                    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)
                self._made[id(value)] = value, made  # type: ignore[assignment]
            return self._made[id(value)][1]
        if isinstance(value, torch.device) and value.type == "cpu":
            return CUDA
        if isinstance(value, tuple | list):
            return type(value)(self.value(each) for each in value)
        return value

    def graph(self, graph: GraphModule) -> None:
        for module in graph.modules():
            if isinstance(module, GraphModule):
                for node in module.graph.nodes:
                    if "val" in node.meta:
                        node.meta["val"] = self.value(node.meta["val"])
                    node.args = map_aggregate(node.args, self._device)
                    node.kwargs = map_aggregate(node.kwargs, self._device)
                module.recompile()

    @staticmethod
    def _device(value: Any) -> Any:
        return CUDA if isinstance(value, torch.device) and value.type == "cpu" else value


def _lower(graph: GraphModule, inputs: Sequence[Any], card: Card, options: dict[str, Any]) -> Program:
    """The program of a traced graph."""
    graph, relabelling = deepcopy(graph), _Relabelling()
    mode = next(each.fake_mode for each in inputs if isinstance(each, FakeTensor))
    written: list[tuple[str, int, tuple[tuple[str, int], ...]]] = []

    def write(lowering: GraphLowering) -> Any:
        source = lowering.codegen()[0].value
        total, of_nodes, _ = lowering.count_bytes()
        names = [(_name_of(node), node.get_read_write_buffers_sizes()) for node, _ in of_nodes]
        written.append((source, total, tuple(names)))
        return SimpleNamespace(__file__="", call=lambda *_: None)

    with pretended(card):
        relabelling.graph(graph)
        with (
            mock.patch.object(GraphLowering, "compile_to_module", write),
            mock.patch.object(compile_fx, "fake_tensor_prop", return_value=mode),  # every node has its value
            config.patch({"fx_graph_cache": False}),
        ):
            compile_fx.compile_fx_inner(graph, [relabelling.value(each) for each in inputs], **options)
    kind = "backward" if options.get("is_backward") else "inference" if options.get("is_inference") else "forward"
    targets = tuple(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return Program(kind, *written[0], targets)


def _name_of(node: Any) -> str:
    inner = node.node
    return str(getattr(inner, "python_kernel_name", None) or type(inner).__name__) if inner is not None else "fused"


def gpu_backend(
    card: Card, kept: list[Program], run: Callable[[Program], Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """A backend of torch.compile that lowers for the card, and runs the graph on the CPU.

    Args:
        card: to lower for.
        kept: where the programs are appended.
        run: what runs a program instead of the graph it was made of.
    """

    def inner(graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        program = _lower(graph, inputs, card, options)
        kept.append(program)
        call = graph.forward if run is None else run(program)

        def boxed(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()
            return call(*taken)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        with config.patch({"fx_graph_cache": False}), torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    return backend


@contextmanager
def flex_as_on_gpu() -> Iterator[None]:
    """Let FlexAttention take CPU tensors that require gradients, and keep what the backward pass needs, as on a GPU."""
    original = flex_attention_module._apply_kernel_options

    def accept(*_: Any) -> None: ...

    def options(query: Any, key: Any, value: Any, return_lse: bool, given: Any, return_aux: Any = None) -> Any:
        return original(query, key, value, return_lse or torch.is_grad_enabled(), given, return_aux)

    with (
        mock.patch.object(flex_attention_module, "_validate_device", accept),
        mock.patch.object(flex_attention_module, "_apply_kernel_options", options),
    ):
        yield
