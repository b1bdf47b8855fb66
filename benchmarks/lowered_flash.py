"""FlashAttention-4 compiled to machine code without a GPU, for the attention of known models; for scripts/lower.py.

Its kernels are traced on fake tensors. What `ptxas` says of registers and spills is asked of the ptxas that Triton
brings; shared memory is the structure that a kernel allocates in a thread block.
"""

from __future__ import annotations

import os
import re
import site
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import triton
from geometries import Geometry
from lowered_kernels import Cubin, read_ptxas
from lowering import Card
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.model import flash
from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_trees import Spans

PACKAGES: Final = Path(__file__).parents[1] / ".venv-flash"
TOKENS: Final = 4096
SEQUENCES: Final = 4
PASSES: Final = {"flash_fwd_sm": "forward", "flash_bwd_sm": "backward"}
"""By a part of the file's name; kernels before and behind the backward pass multiply no matrices."""
_THREADS: Final = re.compile(r"\.(?:req|max)ntid\s+(\d+)")


class NoKernelError(Exception):
    """The package has no kernel for this attention on this card."""


def is_installed() -> bool:
    """Whether scripts/setup_flash has run."""
    return (PACKAGES / "flash_attn").is_dir()


def flash_cubins(geometry: Geometry, card: Card, *, is_causal: bool) -> Iterator[tuple[str, Cubin]]:
    """Pass and machine code of the forward and of the backward kernel of a geometry, in bfloat16.

    Args:
        geometry: heads, sizes, window and so on.
        card: to compile for.
        is_causal: as sequences; otherwise as branches to their prefixes.

    Raises:
        NoKernelError: with the package's words.
    """
    folder = Path(_written().name)
    for file in folder.iterdir():
        file.unlink()
    with _compiling(card, folder), _allocated() as shared_bytes:
        with FakeTensorMode():
            try:
                _run(geometry, is_causal)
            except (AssertionError, NotImplementedError) as error:  # as the package refuses what it has no kernel for
                raise NoKernelError(str(error).splitlines()[0]) from error
        for part, name in PASSES.items():
            (file,) = (each for each in folder.glob("*.ptx") if part in each.name)
            yield name, _cubin(f"flash_{name}", file, card, shared_bytes.pop(0))


@cache
def _written() -> tempfile.TemporaryDirectory[str]:
    """Where the package writes what it compiles; it asks once in a process, at whose end the folder is removed."""
    return tempfile.TemporaryDirectory()


def _run(geometry: Geometry, is_causal: bool) -> None:
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    width = geometry.value_width or geometry.width
    query, grad = make(TOKENS, geometry.heads, geometry.width), make(TOKENS, geometry.heads, width)
    key, value = make(TOKENS, geometry.kv_heads, geometry.width), make(TOKENS, geometry.kv_heads, width)
    spans = Spans(make(SEQUENCES + 1, dtype=torch.int32), make(SEQUENCES + 1, dtype=torch.int32), is_causal)
    sinks = make(geometry.heads) if geometry.has_sinks else None
    options = AttentionOptions(geometry.width**-0.5, geometry.window, geometry.softcap, sinks)
    found = flash.forward(query, key, value, spans, options)
    flash.gradients(grad, (query, key, value), found, spans, options)


def _cubin(name: str, file: Path, card: Card, shared_bytes: int) -> Cubin:
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"  # the newer one
    command = [str(ptxas), "-v", f"-arch=sm_{card.arch}a", str(file), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    source = file.read_text()
    warps = int(_THREADS.findall(source)[0]) // 32
    return read_ptxas(name, f"warps={warps}", shared_bytes, done.stderr, source)


@contextmanager
def _compiling(card: Card, folder: Path) -> Iterator[None]:
    """Let the package compile for the card, and keep its PTX in the folder."""
    arch = f"sm_{card.arch}"
    os.environ |= {
        "CUTE_DSL_ARCH": f"{arch}a",
        "FLASH_ATTENTION_ARCH": arch,
        "FLASH_ATTENTION_NUM_SMS": str(card.processors),
        "CUTE_DSL_KEEP_PTX": "1",
        "CUTE_DSL_DUMP_DIR": str(folder),
    }
    site.addsitedir(str(PACKAGES))  # its .pth file adds the compiler's folder
    with mock.patch.object(fake_tensor, "init_gpu_context"):
        yield


@contextmanager
def _allocated() -> Iterator[list[int]]:
    """Bytes of shared memory of each kernel that keeps its tiles in a structure, in the order of compilation."""
    from cutlass import utils

    found: list[int] = []
    original = utils.SmemAllocator.allocate

    def allocate(allocator: Any, kind: Any, *arguments: Any, **options: Any) -> Any:
        if hasattr(kind, "size_in_bytes"):
            found.append(int(kind.size_in_bytes()))
        return original(allocator, kind, *arguments, **options)

    with mock.patch.object(utils.SmemAllocator, "allocate", allocate):
        yield found
