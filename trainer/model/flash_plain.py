"""What flash.py computes, in torch's operators and float32: on CPUs, and for the test in flash_choice.py.

    S = s Q K^T,  S' = c tanh(S / c) with a soft cap c,  P = exp(S' - L),  O = P V
    D = rowsum(dO O),  dV = P^T dO,  dS' = P (dO V^T - D),  dS = dS' (1 - (S' / c)^2),  dQ = s dS K,  dK = s dS^T Q
    L is the log-sum-exp of S' and of the sink z, if there is one;  dz = -sum of exp(z - L) D

arXiv 2307.08691, algorithms 1 and 2, without tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from trainer.model.eager_attention import AttentionOptions, causal_mask
from trainer.model.flash_trees import Found, Given, Gradients, Spans


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, options: AttentionOptions
) -> Found:
    """`flash.forward`."""
    outputs, sums = [], []
    for tokens, keys in _sequences(spans):
        own_query, own_key, own_value = _by_head(query[tokens], key[keys], value[keys])
        scores = _scores(own_query, own_key, options, is_causal=spans.is_causal)
        log_sum_exp = scores.logsumexp(-1)
        if options.sinks is not None:
            log_sum_exp = torch.logaddexp(log_sum_exp, options.sinks.float()[:, None])
        outputs.append(((scores - log_sum_exp[..., None]).exp() @ own_value).transpose(0, 1))
        sums.append(log_sum_exp)
    return torch.cat(outputs).to(query.dtype), torch.cat(sums, 1)


def gradients(grad: torch.Tensor, given: Given, found: Found, spans: Spans, options: AttentionOptions) -> Gradients:
    """`flash.gradients`."""
    (query, key, value), (output, log_sum_exp) = given, found
    parts: list[list[torch.Tensor]] = [[], [], []]
    kv_heads = key.shape[1]
    dots = (grad.float() * output.float()).sum(-1).T
    for tokens, keys in _sequences(spans):
        own_query, own_key, own_value = _by_head(query[tokens], key[keys], value[keys])
        own_grad = grad[tokens].float().transpose(0, 1)
        scores = _scores(own_query, own_key, options, is_causal=spans.is_causal)
        weights = (scores - log_sum_exp[:, tokens, None]).exp()
        grad_scores = weights * (own_grad @ own_value.transpose(1, 2) - dots[:, tokens, None])
        if options.softcap is not None:
            grad_scores = grad_scores * (1 - (scores.clamp(min=-options.softcap) / options.softcap) ** 2)
        grad_scores = grad_scores * options.scaling
        grad_key, grad_value = grad_scores.transpose(1, 2) @ own_query, weights.transpose(1, 2) @ own_grad
        of_heads = grad_scores @ own_key, *(each.unflatten(0, (kv_heads, -1)).sum(1) for each in (grad_key, grad_value))
        for of_sequences, part in zip(parts, of_heads, strict=True):
            of_sequences.append(part.transpose(0, 1))
    of_query, of_key, of_value = (torch.cat(each).to(query.dtype) for each in parts)
    if options.sinks is None:
        return of_query, of_key, of_value, None
    of_sinks = -((options.sinks.float()[:, None] - log_sum_exp).exp() * dots).sum(1)
    return of_query, of_key, of_value, of_sinks.to(options.sinks.dtype)


def _sequences(spans: Spans) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each sequence."""
    queries, keys = ([slice(*pair) for pair in pairwise(each.tolist())] for each in (spans.queries, spans.keys))
    return zip(queries, keys, strict=True)


def _by_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[H, L, D] of each, with the keys and values of a query head repeated."""
    times = query.shape[1] // key.shape[1]
    wide = (each.float().transpose(0, 1) for each in (query, key, value))
    query, *rest = wide
    key, value = (each.repeat_interleave(times, 0) for each in rest)
    return query, key, value


def _scores(query: torch.Tensor, key: torch.Tensor, options: AttentionOptions, *, is_causal: bool) -> torch.Tensor:
    """[H, L, n] of one sequence, -inf where a query does not see a key."""
    scores = query @ key.transpose(1, 2) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if not is_causal:
        return scores
    length = scores.shape[1]
    return scores.masked_fill(~causal_mask(length, length, options.window, query.device), float("-inf"))
