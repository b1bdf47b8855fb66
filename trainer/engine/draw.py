"""Draw the next token of each row, with the parameters of its own request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch

from trainer.engine.sequences import LiveSequence
from trainer.model.lm_head import LogitTransform
from trainer.sampling import noise

TILE_CELLS: Final = 1 << 18
"""Logits handled at once: few enough for the cache of a CPU."""
Report: TypeAlias = dict[str, Any] | None
"""`logprob` and `top` of a token, where they were asked for."""


@final
@dataclass(frozen=True)
class Drawn:
    """The next token of a row."""

    token: int
    report: Report
    is_finite: bool


def scaled(logits: torch.Tensor, form: LogitTransform) -> torch.Tensor:
    """[R, V] float32 logits of the model, from the raw outputs of its head."""
    logits = logits.float()
    if form.scale != 1.0:
        logits = logits * form.scale
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    return logits


def draw(raw: torch.Tensor, form: LogitTransform, rows: Sequence[LiveSequence]) -> list[Drawn]:
    """The next token of each row.

    Reported log-probabilities are of the model's own distribution: before bias, penalties, temperature and truncation.

    Args:
        raw: [R, V] outputs of the head.
        form: what the model does to them.
        rows: the sequences.
    """
    drawn: list[Drawn | None] = [None] * len(rows)
    by_filter: dict[tuple[bool, float, int, float], list[int]] = {}
    for index, row in enumerate(rows):
        how = row.sampling
        is_greedy = how.temperature == 0
        key = (True, 1.0, 0, 0.0) if is_greedy else (False, how.top_p, how.top_k, how.min_p)
        by_filter.setdefault(key, []).append(index)
    size = max(1, TILE_CELLS // raw.shape[1])
    for (is_greedy, top_p, top_k, min_p), members in by_filter.items():
        for begin in range(0, len(members), size):
            part = members[begin : begin + size]
            some = [rows[index] for index in part]
            own = scaled(raw[part] if len(part) < len(rows) else raw, form)
            changed = adjusted(own, some)
            if is_greedy:
                tokens = changed.argmax(-1)
            else:
                temperature = torch.tensor([row.sampling.temperature for row in some])
                quanta = noise.quantize((changed / temperature[:, None]).softmax(-1))
                quanta = noise.truncate(quanta, top_k=top_k, top_p=top_p, min_p=min_p)
                tokens = noise.draw(quanta, _uniforms(some)).clamp(max=raw.shape[1] - 1)
            finite = torch.isfinite(own.amax(-1)).tolist()  # a NaN anywhere makes the maximum one
            reports = reported(own, tokens, [row.sampling.logprobs for row in some])
            for index, token, report, is_finite in zip(part, tokens.tolist(), reports, finite, strict=True):
                drawn[index] = Drawn(token, report, is_finite)
    return [each for each in drawn if each is not None]


def reported(logits: torch.Tensor, tokens: torch.Tensor, wanted: Sequence[int | None]) -> list[Report]:
    """Log-probability and likeliest alternatives of tokens, for the rows that want them.

    Args:
        logits: [R, V] of the model.
        tokens: [R].
        wanted: alternatives of each row; None reports nothing.
    """
    if all(each is None for each in wanted):
        return [None] * len(wanted)
    total = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(1, tokens[:, None]) - total).squeeze(1).tolist()
    most = max(each or 0 for each in wanted)
    values, ids = logits.topk(most) if most else (logits[:, :0], tokens[:, None][:, :0])
    values = values - total
    reports: list[Report] = []
    for row, number in enumerate(wanted):
        if number is None:
            reports.append(None)
            continue
        top = zip(ids[row, :number].tolist(), values[row, :number].tolist(), strict=True)
        reports.append({"logprob": chosen[row], "top": [list(each) for each in top]})
    return reports


def adjusted(logits: torch.Tensor, rows: Sequence[LiveSequence]) -> torch.Tensor:
    """Logits after penalties, bias and grammar; the same tensor where no row has any.

    z -= presence * [count > 0] + frequency * count of tokens drawn so far; z / repetition where z > 0, z * repetition
    where z < 0, of tokens in prompt or completion (arXiv:1909.05858); then bias; tokens outside the grammar are
    excluded.
    """
    out = logits
    for index, row in enumerate(rows):
        how = row.sampling
        is_penalized = bool(how.presence_penalty or how.frequency_penalty) and bool(row.counts)
        if not (is_penalized or how.repetition_penalty != 1 or how.logit_bias or row.matcher is not None):
            continue
        if out is logits:
            out = logits.clone()
        if how.repetition_penalty != 1:
            seen = torch.tensor(list({*row.prompt, *row.counts}))
            values = out[index, seen]
            factor = torch.where(values > 0, 1 / how.repetition_penalty, how.repetition_penalty)
            out[index, seen] = values * factor
        if is_penalized:
            ids, counts = torch.tensor(list(row.counts)), torch.tensor(list(row.counts.values())).float()
            out[index, ids] -= how.presence_penalty + how.frequency_penalty * counts
        if how.logit_bias:
            ids, bias = torch.tensor([t for t, _ in how.logit_bias]), torch.tensor([b for _, b in how.logit_bias])
            out[index, ids] += bias
        if row.matcher is not None:
            out[index].masked_fill_(~allowed(row.matcher, out.shape[1]), float("-inf"))
    return out


def allowed(matcher: Any, vocab: int) -> torch.Tensor:
    """[V] bool: tokens with which the text can follow its grammar."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    flags = torch.zeros(vocab, dtype=torch.bool)
    known = min(vocab, len(bits))
    flags[:known] = torch.from_numpy(bits[:known].astype(bool))
    return flags


def _uniforms(rows: Sequence[LiveSequence]) -> torch.Tensor:
    keys = torch.tensor([row.noise_key for row in rows])
    return noise.uniforms_at(keys, torch.tensor([row.noise_position for row in rows]))
