"""Chooses FlashAttention-4 (flash.py) or FlexAttention for the compiled layers of a model; for compiled_layers.py.

FlashAttention-4 runs where its package is installed, on GPUs that it supports, if it passes a test there before the
first pack that uses it: every kind of attention that the model's layers have is computed many times, forward and
backward, and compared with float32. Its kernels had errors that a single launch does not show: a race in 0.1 to 1% of
backward launches (flash-attention pull request 2756), wrong gradients at a head dimension of 64 (issue 2623).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NamedTuple

import torch

from trainer.model import flash, flash_plain, flash_trees
from trainer.model.eager_attention import AttentionOptions
from trainer.model.flash_trees import Kernels, Parts

VERSION: Final = "4.0.0b36"
"""Of flash-attn-4: an exact one, because the functions that flash.py calls are not public."""
LAUNCHES: Final = 1000
"""Of each kind, forward and backward."""
TREES: Final = ((300, ()), (128, ()), (1, ()), (150, (130, 1, 64)), (100, (128, 22)))
"""Sequences and branches behind prefixes in the test: whole blocks, parts of blocks, a single token; 1,024 in all."""
TOLERANCE: Final = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference to float32, over the largest value: a few roundings of the softmax's weights and of the result."""


class AttentionKind(NamedTuple):
    """What the kernels are compiled for: the attention of a layer without its values."""

    heads: int
    kv_heads: int
    width: int
    """D, of queries and keys."""
    value_width: int
    dtype: torch.dtype
    scaling: float
    window: int | None
    softcap: float | None
    has_sinks: bool

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> AttentionKind:
        """The kind of a layer.

        Args:
            query: [1, H, T, D].
            key: [1, H_kv, T, D].
            value: [1, H_kv, T, D_v].
            options: of the layer's attention.
        """
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        scaling, has_sinks = options.scaling, options.sinks is not None
        return cls(*sizes, query.dtype, scaling, options.window, options.softcap, has_sinks)


KERNELS: Final = Kernels(flash.forward, flash.gradients)
PLAIN: Final = Kernels(flash_plain.forward, flash_plain.gradients)


def kernels_for(query: torch.Tensor) -> Kernels:
    """What computes attention on the tensor's device."""
    return KERNELS if query.device.type == "cuda" else PLAIN


def uses_flash(kinds: Collection[AttentionKind], device: torch.device) -> bool:
    """Whether FlashAttention-4 computes the attention of packs; a warning says why not, where it could.

    Args:
        kinds: of all layers.
        device: of the model.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():  # its backward pass adds in any order
        return False
    # A branch attends to its prefix without a window, also where the layer has one that it does not leave.
    to_prefixes = {kind._replace(window=None) for kind in kinds if not kind.has_sinks}
    for kind in sorted(to_prefixes.union(kinds), key=repr):
        problem = _problem_on(device, kind)
        if problem is not None:
            warnings.warn(
                f"attention runs in FlexAttention, which is slower than FlashAttention-4: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


@cache
def _problem_on(device: torch.device, kind: AttentionKind) -> str | None:
    return problem_of_package() or problem_of(KERNELS, device, kind)


def problem_of_package() -> str | None:
    """What keeps flash-attn-4 from being used, before any kernel is compiled."""
    try:
        found = version("flash-attn-4")
    except PackageNotFoundError:
        return 'flash-attn-4 is not installed: pip install "tunesmith[flash]"'
    return None if found == VERSION else f"flash-attn-4 {found} is installed, and {VERSION} is needed"


def problem_of(kernels: Kernels, device: torch.device, kind: AttentionKind, launches: int = LAUNCHES) -> str | None:
    """What is wrong with the kernels for a kind of attention; None if nothing.

    Args:
        kernels: to test.
        device: to test on.
        kind: of attention.
        launches: of each pass.
    """
    if kind.dtype not in TOLERANCE:
        return f"it computes in 16 bits only, and the model in {str(kind.dtype).removeprefix('torch.')}"
    try:
        worst = largest_differences(kernels, device, kind, launches)
    except Exception as error:  # of the package, its compiler or the driver: FlexAttention computes the same
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for name, difference in worst.items():
        if not difference <= TOLERANCE[kind.dtype]:
            return f"{name} differs by {difference:.1e} of its largest value in {launches} launches ({kind})"
    return None


def largest_differences(kernels: Kernels, device: torch.device, kind: AttentionKind, launches: int) -> dict[str, float]:
    """The largest difference of each result to float32 over all launches, over its largest value.

    Args:
        kernels: to compare with `PLAIN`.
        device: to compute on.
        kind: of attention.
        launches: of each pass.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(kind.dtype)

    has_branches = kind.window is None and not kind.has_sinks  # branches with either are computed by FlexAttention
    lengths = [prefix + sum(branches) for prefix, branches in TREES]
    parts = Parts.of(TREES if has_branches else [(length, ()) for length in lengths], 0)
    parts = parts.moved(lambda each: each.to(device))
    total = sum(lengths)
    query, grad = normal(total, kind.heads, kind.width), normal(total, kind.heads, kind.value_width)
    key, value = normal(total, kind.kv_heads, kind.width), normal(total, kind.kv_heads, kind.value_width)
    sinks = normal(kind.heads) if kind.has_sinks else None
    options = AttentionOptions(kind.scaling, kind.window, kind.softcap, sinks)

    def results(of: Kernels) -> dict[str, torch.Tensor]:
        kept = flash_trees.forward(of, query, key, value, parts, options)
        found = flash_trees.gradients(of, grad, (query, key, value), kept, parts, options)
        names = ("its output", "its gradient of queries", "of keys", "of values", "of sinks")
        pairs = zip(names, (kept[0], *found), strict=True)
        return {name: tensor.float() for name, tensor in pairs if tensor is not None}

    wanted = results(PLAIN)
    worst = {name: torch.zeros((), device=device) for name in wanted}
    for _ in range(launches):  # the host does not wait for any of them
        for name, found in results(kernels).items():
            difference = (found - wanted[name]).abs().max()
            worst[name] = torch.maximum(worst[name], difference.nan_to_num(float("inf")))
    return {name: float(worst[name] / wanted[name].abs().max()) for name in wanted}
