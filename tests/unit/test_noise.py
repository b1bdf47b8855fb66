"""Noise is uniform, independent and a function of its counters; draws follow the distribution."""

from __future__ import annotations

import pytest
import torch
from chi_square import excess

from trainer.sampling import noise

CPU = torch.device("cpu")
LIMIT = 4.0
"""Standard deviations; seeds are fixed, so a test that passes once passes always."""


def splitmix(value: int) -> int:
    mask = (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize(
    "counters", [(0, 0, 0, 0, 0), (17, 3, 250_000, 7, 4095), (-5, 0, 1, 2, 3), (2**63 - 1, 9, 9, 9, 9)]
)
def test_uniform_is_the_documented_formula(counters):
    seed, step, row, sample, position = counters
    key = splitmix(seed % 2**64)
    for counter in (step, row, sample, position):
        key = splitmix((key + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64)

    keys = noise.row_keys(seed, step, [row], [sample], CPU)
    assert noise.uniforms(keys, position).item() == (key >> 16) / 2**48


def all_uniforms(seeds=(0,), steps=(0,), rows=(0,), samples=(0,), positions=(0,)):
    found = []
    for seed in seeds:
        for step in steps:
            keys = noise.row_keys(
                seed, step, [row for row in rows for _ in samples], [sample for _ in rows for sample in samples], CPU
            )
            found += [noise.uniforms(keys, position) for position in positions]
    return torch.cat(found)


@pytest.mark.parametrize("axis", ["seeds", "steps", "rows", "samples", "positions"])
def test_uniforms_are_uniform_and_uncorrelated_along_each_counter(axis):
    values = all_uniforms(**{axis: range(20_000)})

    counts = torch.histc(values, bins=100, min=0, max=1)
    assert excess(counts, torch.ones(100)) < LIMIT
    # neighbours: 10 x 10 cells of (u_n, u_n+1) from disjoint pairs
    pairs = (values.view(-1, 2) * 10).long()
    cells = torch.bincount(pairs[:, 0] * 10 + pairs[:, 1], minlength=100)
    assert excess(cells, torch.ones(100)) < LIMIT


def test_swapping_two_counters_gives_other_noise():
    assert noise.row_keys(1, 2, [3], [4], CPU) != noise.row_keys(1, 2, [4], [3], CPU)
    assert noise.row_keys(1, 2, [3], [4], CPU) != noise.row_keys(2, 1, [3], [4], CPU)


def test_no_two_of_many_completions_share_a_key():
    keys = noise.row_keys(0, 0, [row for row in range(2000) for _ in range(64)], list(range(64)) * 2000, CPU)
    assert len(keys.unique()) == 128_000


def test_drawn_tokens_follow_the_distribution():
    probabilities = torch.randn(600, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)  # over two blocks
    keys = noise.row_keys(5, 0, list(range(100_000)), [0] * 100_000, CPU)
    tokens = noise.draw(noise.quantize(probabilities.expand(len(keys), -1)), noise.uniforms(keys, 0))

    assert excess(tokens.bincount(minlength=600), probabilities) < LIMIT


@pytest.mark.parametrize(
    ("uniform", "token"),
    [
        (0.0, 1),  # token 0 has no probability and is passed over even at 0
        (0.2499, 1),
        (0.25, 2),  # the boundary belongs to the next
        (0.7499, 2),
        (0.75, 299),  # in the second block
        (1 - 2.0**-48, 299),  # the largest uniform stays inside, not on the empty token 300
    ],
)
def test_draw_inverts_the_distribution_function(uniform, token):
    probabilities = torch.zeros(1, 301)
    probabilities[0, [1, 2, 299]] = torch.tensor([0.25, 0.5, 0.25])
    assert noise.draw(noise.quantize(probabilities), torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_draw_never_takes_what_is_below_the_quantum():
    probabilities = torch.tensor([[2.0**-41, 1.0 - 2.0**-41]], dtype=torch.float64)
    assert noise.draw(noise.quantize(probabilities), torch.zeros(1, dtype=torch.float64)).item() == 1


LADDER = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2, "top_p": 1.0, "min_p": 0.0}, [0, 1]),
        ({"top_k": 9, "top_p": 1.0, "min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 0, "top_p": 0.69, "min_p": 0.0}, [0, 1]),
        ({"top_k": 0, "top_p": 0.71, "min_p": 0.0}, [0, 1, 2]),  # the token that crosses the share is kept
        ({"top_k": 0, "top_p": 0.01, "min_p": 0.0}, [0]),  # never empty
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.0}, [0, 1]),  # the share of what top_k left: 0.4 / 0.85 < 0.5
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.3}, [0, 1, 2]),  # at least 0.12
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, [0, 1, 2, 3, 4]),
    ],
)
def test_truncation_keeps(settings, kept):
    quanta = noise.truncate(noise.quantize(LADDER), **settings)
    assert quanta[0].nonzero().squeeze(1).tolist() == kept
    assert torch.equal(quanta[0, kept], noise.quantize(LADDER)[0, kept])


def test_truncation_of_equals_keeps_the_smaller_ids():
    quanta = noise.truncate(noise.quantize(torch.full((1, 8), 0.125)), top_k=3, top_p=1.0, min_p=0.0)
    assert quanta[0].nonzero().squeeze(1).tolist() == [0, 1, 2]
