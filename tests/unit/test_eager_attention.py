"""The written-out attention against autograd's of the same formula, in double precision and in bfloat16."""

from __future__ import annotations

import pytest
import torch

from trainer.model.eager_attention import AttentionOptions, eager_attention

HEADS, KV_HEADS, WIDTH = 4, 2, 8
FORMS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, window=5),
    "softcap": AttentionOptions(0.3, softcap=2.0),
    "sinks": AttentionOptions(0.3, sinks=torch.linspace(-1, 1, HEADS, dtype=torch.double)),
}


def tensors(prefix: int, *, rows: int = 3, length: int = 7, dtype: torch.dtype = torch.double) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, HEADS, length), (rows, KV_HEADS, length), (rows, KV_HEADS, length)]
    sizes += [(1, KV_HEADS, prefix)] * 2 if prefix else []
    made = (torch.randn(*size, WIDTH, generator=generator, dtype=torch.double) for size in sizes)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def ours(form: AttentionOptions, *parts: torch.Tensor) -> torch.Tensor:
    query, key, value, *before = parts
    return eager_attention(query, key, value, (before[0], before[1]) if before else None, form)


def truth(form: AttentionOptions, *parts: torch.Tensor) -> torch.Tensor:
    """The same with every row's keys in one matrix, head by head, by autograd; the softmax in float32, as models do."""
    query, key, value, *before = parts
    if before:
        key, value = (
            torch.cat([b.expand(len(query), -1, -1, -1), t], 2) for b, t in zip(before, (key, value), strict=True)
        )
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * form.scaling
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    num_keys, length = key.shape[2], query.shape[2]
    position = torch.arange(num_keys)
    distance = position[num_keys - length :, None] - position
    seen = (distance >= 0) & (distance < (form.window or num_keys))
    scores = scores.masked_fill(~seen, float("-inf"))
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return weights[..., :num_keys] @ value


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("prefix", [0, 6])
def test_values_and_gradients_are_those_of_the_formula(form, prefix):
    parts = tensors(prefix)
    upstream = torch.randn(parts[0].shape, dtype=torch.double)
    out, wanted = ours(form, *parts), truth(form, *parts)
    torch.testing.assert_close(out, wanted)
    for own, their in zip(
        torch.autograd.grad(out, parts, upstream), torch.autograd.grad(wanted, parts, upstream), strict=True
    ):
        torch.testing.assert_close(own, their)


@pytest.mark.parametrize("prefix", [0, 4])
def test_gradcheck(prefix):
    parts = tensors(prefix, rows=2, length=3)
    assert torch.autograd.gradcheck(lambda *each: ours(FORMS["plain"], *each), parts)


@pytest.mark.parametrize("prefix", [0, 40])
def test_gradients_in_bfloat16_are_nearly_as_close_to_the_truth_as_autograd_s(prefix):
    form, parts = FORMS["plain"], tensors(prefix, length=50, dtype=torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in parts]
    upstream = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    def errors(function) -> list[float]:
        found = torch.autograd.grad(function(form, *parts), parts, upstream)
        wanted = torch.autograd.grad(truth(form, *exact), exact, upstream.double())
        return [float((own - their).norm() / their.norm()) for own, their in zip(found, wanted, strict=True)]

    for own, their in zip(errors(ours), errors(truth), strict=True):
        assert own < 1.2 * their


def test_the_probabilities_are_kept_once():
    parts = tensors(0, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(FORMS["plain"], *parts)
    cells = [tensor for tensor in kept if tensor is not None and tensor.shape[-1] == 7]
    assert [(tensor.dtype, tensor.numel()) for tensor in cells] == [(torch.bfloat16, 3 * HEADS * 7 * 7)]
