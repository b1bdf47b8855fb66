"""Chooses between the kernels of thin.py and torch's operators, for the operators of compiled LoRA layers.

The kernels run on a GPU with 16-bit values and ranks up to `MAX_RANK`, if they pass a test there: once for each device,
type and rank, before they are first used, they compute what torch's operators compute in float32, and the same bits at
every launch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Final, NamedTuple

import torch

from trainer.model import thin, thin_plain
from trainer.planning.thin_cut import MAX_RANK

MAX_LAYERS: Final = 3
"""Whose products one kernel computes."""
LAUNCHES: Final = 20
"""Of each kernel in the test."""
TOLERANCE: Final = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference to float32, over the largest value: a few roundings."""

Pair = tuple[torch.Tensor, torch.Tensor]
Gated = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class ThinProducts(NamedTuple):
    """The functions of thin.py, or of thin_plain.py."""

    gradients: Callable[
        [torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[float]], tuple[torch.Tensor, list[torch.Tensor]]
    ]
    swiglu: Callable[[torch.Tensor, torch.Tensor, Pair, torch.Tensor, tuple[float, float]], Pair]
    swiglu_gradients: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Pair, torch.Tensor, tuple[float, float]], Gated
    ]


KERNELS: Final = ThinProducts(thin.thin_gradients, thin.swiglu, thin.swiglu_gradients)
PLAIN: Final = ThinProducts(thin_plain.thin_gradients, thin_plain.swiglu, thin_plain.swiglu_gradients)


def products_for(values: torch.Tensor, ups: Sequence[torch.Tensor]) -> ThinProducts:
    """What computes the products of adapters with a tensor.

    Args:
        values: of the wide side.
        ups: B of each layer, [out, r].
    """
    ranks = {up.shape[1] for up in ups}
    fits = len(ranks) == 1 and max(ranks) <= MAX_RANK and len(ups) <= MAX_LAYERS
    return _tested(values.device, values.dtype, ups[0].shape[1]) if fits and _is_on_gpu(values) else PLAIN


def has_kernels(values: torch.Tensor, ups: Sequence[torch.Tensor]) -> bool:
    """Whether `products_for` are the kernels."""
    return products_for(values, ups) is KERNELS


def _is_on_gpu(values: torch.Tensor) -> bool:
    return values.device.type == "cuda" and values.dtype in TOLERANCE


@cache
def _tested(device: torch.device, dtype: torch.dtype, rank: int) -> ThinProducts:
    problem = problem_of(KERNELS, device, dtype, rank)
    if problem is None:
        return KERNELS
    warnings.warn(
        f"the kernels for adapters of rank {rank} are not used, which is slower: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
    return PLAIN


def problem_of(products: ThinProducts, device: torch.device, dtype: torch.dtype, rank: int) -> str | None:
    """What is wrong with the products on a device; None if nothing.

    Args:
        products: to test.
        device: to test on.
        dtype: of `TOLERANCE`.
        rank: r.
    """
    try:
        for name, worst in differences(products, device, dtype, rank):
            if worst is None:
                return f"{name} does not give the same bits at every launch"
            if not worst <= TOLERANCE[dtype]:
                return f"{name} differs from torch by {worst:.1e} of its largest value"
    except Exception as error:  # of Triton, its compiler or the driver: whatever it is, torch computes the same
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def differences(
    products: ThinProducts, device: torch.device, dtype: torch.dtype, rank: int, launches: int = LAUNCHES
) -> Iterator[tuple[str, float | None]]:
    """The largest difference of each function's results to float32, over their largest value; None: bits changed.

    Sizes are multiples of 16, as those of models are, but not of a strip.

    Args:
        products: to compare with torch's operators.
        device: to compute on.
        dtype: of all tensors.
        rank: r.
        launches: whose bits must be equal.
    """
    rows, widths, scalings = 592, (768, 128, 128), (0.5, 2.0, 1.0)
    width = widths[0]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    ups, pair, down = (
        [normal(each, rank) for each in widths],
        (normal(width, rank), normal(width, rank)),
        normal(rank, width),
    )
    both, inner, factors = normal(rows, 2 * width), normal(rows, 2 * rank), (0.5, 0.25)
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("gradients", (normal(rows, sum(widths)), normal(rows, 3 * rank), ups, scalings)),
        ("swiglu", (both, inner, pair, down, factors)),
        ("swiglu_gradients", (normal(rows, width), both, inner, normal(rows, rank), pair, down, factors)),
    ]
    for name, arguments in cases:
        wanted = _flat(getattr(PLAIN, name)(*(_in_float32(each) for each in arguments)))
        found = _flat(getattr(products, name)(*arguments))
        pairs = zip(found, wanted, strict=True)
        distances = [float((one.float() - other).abs().max() / other.abs().max()) for one, other in pairs]
        if not all(map(math.isfinite, distances)):
            yield name, math.inf
            continue
        again = (_flat(getattr(products, name)(*arguments)) for _ in range(launches - 1))
        is_equal = all(torch.equal(one, other) for each in again for one, other in zip(found, each, strict=True))
        yield name, max(distances) if is_equal else None


def _flat(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    assert isinstance(result, tuple | list)
    return [tensor for each in result for tensor in _flat(each)]


def _in_float32(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.float()
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(each) for each in value)
    return value
