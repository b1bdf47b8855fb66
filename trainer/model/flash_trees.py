"""Attention of packs by kernels that know only sequences end to end: also of branches that continue a common prefix.

Branches are computed twice, to themselves (causal) and to their prefix (whole), and put together by the log-sum-exp L:

    L = log(exp(L_1) + exp(L_2)),  O = exp(L_1 - L) O_1 + exp(L_2 - L) O_2

In the backward pass both parts are given O and L, so that P = exp(S - L) is the softmax over all keys; gradients of
queries, and of the prefix's keys and values, are sums (arXiv 2310.01889, section 3). For flash_attention.py and
flash_choice.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from trainer.model.eager_attention import AttentionOptions

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [Q, H, D], key [K, H_kv, D] and value [K, H_kv, D_v]."""
Found = tuple[torch.Tensor, torch.Tensor]
"""Attention [Q, H, D_v], and the float32 log-sum-exp of its scores, [H, Q]."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of query, key, value and, if there are any, of the sinks."""


class Spans(NamedTuple):
    """Which queries attend to which keys: those of sequence i to those of sequence i."""

    queries: torch.Tensor
    """[S + 1] int32: where the queries of each sequence begin, and their number."""
    keys: torch.Tensor
    """[S + 1] int32: the same of keys and values."""
    is_causal: bool
    """Each query to its own key and earlier ones; otherwise to all of the sequence."""


class Parts(NamedTuple):
    """The parts of a pack: sequences, prefixes and branches, and which branches continue which prefix."""

    starts: torch.Tensor
    """[S + 1] int32: where each part begins, and the end of the pack."""
    branch_rows: torch.Tensor | None = None
    """[n] places in the pack of all tokens of branches; None: there are no branches, and nothing below."""
    branch_starts: torch.Tensor | None = None
    """[t + 1] int32: where the branches of each tree begin in `branch_rows`, and n."""
    prefix_rows: torch.Tensor | None = None
    """[m] places in the pack of the prefixes of these trees."""
    prefix_starts: torch.Tensor | None = None
    """[t + 1] int32: where each of them begins in `prefix_rows`, and m."""

    @classmethod
    def of(cls, trees: Sequence[tuple[int, Sequence[int]]], padding: int) -> Parts:
        """The parts of trees whose branches continue all of their prefix; on the CPU.

        Args:
            trees: prefix length and branch lengths of each, in the order of the pack.
            padding: tokens behind them, a part of their own.
        """
        lengths: list[int] = []
        rows: list[torch.Tensor] = []
        prefixes: list[torch.Tensor] = []
        place = 0
        for prefix, branches in trees:
            lengths += [prefix, *branches]
            if branches:
                prefixes.append(torch.arange(place, place + prefix))
                rows.append(torch.arange(place + prefix, place + prefix + sum(branches)))
            place += prefix + sum(branches)
        starts = _starts([*lengths, *([padding] if padding else [])])
        if not rows:
            return cls(starts)
        of_branches, of_prefixes = (_starts([len(each) for each in parts]) for parts in (rows, prefixes))
        return cls(starts, torch.cat(rows), of_branches, torch.cat(prefixes), of_prefixes)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Parts:
        """The parts with each tensor moved, for example to a device."""
        starts, *rest = self
        assert starts is not None
        return Parts(move(starts), *(None if each is None else move(each) for each in rest))

    @property
    def own(self) -> Spans:
        """Each part to itself."""
        return Spans(self.starts, self.starts, True)


class Kernels(NamedTuple):
    """The functions of flash.py, or of flash_plain.py."""

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Spans, AttentionOptions], Found]
    gradients: Callable[[torch.Tensor, Given, Found, Spans, AttentionOptions], Gradients]


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def forward(
    kernels: Kernels,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    parts: Parts,
    options: AttentionOptions,
) -> Found:
    """[T, H, D_v] attention, and [H, T] float32 log-sum-exp of the scores.

    Args:
        kernels: that compute it.
        query: [T, H, D].
        key: [T, H_kv, D].
        value: [T, H_kv, D_v].
        parts: of the pack.
        options: of the layer's attention; with branches its window must be longer than all sequences, without sinks.
    """
    output, sums = kernels.forward(query, key, value, parts.own, options)
    if parts.branch_rows is None:
        return output, sums
    rows, prefix, spans, whole = _to_prefixes(parts, options)
    there, sums_there = kernels.forward(query[rows], key[prefix], value[prefix], spans, whole)
    own_sums = sums[:, rows]
    total = torch.logaddexp(own_sums, sums_there)
    here = output[rows].float() * (own_sums - total).exp().T[..., None]
    output[rows] = (here + there.float() * (sums_there - total).exp().T[..., None]).to(output.dtype)
    sums[:, rows] = total
    return output, sums


def gradients(
    kernels: Kernels,
    grad: torch.Tensor,
    given: Given,
    found: Found,
    parts: Parts,
    options: AttentionOptions,
) -> Gradients:
    """Gradients of query, key, value and, if there are any, of the sinks.

    Args:
        kernels: that compute them.
        grad: of the output, [T, H, D_v].
        given: query, key and value, as in `forward`.
        found: what `forward` returned.
        parts: as in `forward`.
        options: as in `forward`.
    """
    (query, key, value), (output, sums) = given, found
    own = kernels.gradients(grad, given, found, parts.own, options)
    if parts.branch_rows is None:
        return own
    rows, prefix, spans, whole = _to_prefixes(parts, options)
    given_there = query[rows], key[prefix], value[prefix]
    there = kernels.gradients(grad[rows], given_there, (output[rows], sums[:, rows].contiguous()), spans, whole)
    for of_pack, of_part, places in zip(own[:3], there[:3], (rows, prefix, prefix), strict=True):
        assert of_pack is not None
        of_pack[places] += of_part  # each place once, so that nothing is added in an order of chance
    return own


def _to_prefixes(parts: Parts, options: AttentionOptions) -> tuple[torch.Tensor, torch.Tensor, Spans, AttentionOptions]:
    """Places of branches and of prefixes, who attends to whom, and the options without a window."""
    _, rows, of_rows, prefix, of_prefixes = parts
    assert rows is not None
    assert prefix is not None
    assert of_rows is not None
    assert of_prefixes is not None
    return rows, prefix, Spans(of_rows, of_prefixes, False), replace(options, window=None)
