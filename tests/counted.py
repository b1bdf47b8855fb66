"""Counts the bytes that a rank receives, also in torch's `fake` process group, which moves nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FACTORS = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2}
"""Times (n - 1) / n of the whole tensor that a rank receives: an all-reduce is a reduce-scatter and a gather."""

SLICES = ("all_gather_into_tensor", "reduce_scatter_tensor")
"""What the slices of a pack exchange."""


class Counting(TorchDispatchMode):
    """Bytes that this rank receives, by operation and number of ranks."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[tuple[str, int]] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let layers compile while this counts; collectives are outside of them."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):  # attention in compiled layers
            return func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "_c10d_functional" and name in SLICES:
            tensor, ranks = args[0], args[-2]
            size = tensor.numel() * tensor.element_size() * (ranks if name == "all_gather_into_tensor" else 1)
            self.received[name, ranks] += size * (ranks - 1) // ranks
        if namespace == "c10d" and name in FACTORS:
            group = next(each for each in args if isinstance(each, torch.ScriptObject))
            ranks = distributed.ProcessGroup.unbox(group).size()
            sizes = [each.numel() * each.element_size() for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            self.received[name, ranks] += FACTORS[name] * max(sizes) * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))
