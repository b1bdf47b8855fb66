"""The cache across turns: the same logprobs as reading everything again, and only what is new is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sampled import FAMILIES, PARAMS, logprobs_of, prompt, published, scored, tiny_policy
from tiny import tiny_model_dir

from trainer.config.recipe import LoraSettings
from trainer.model import tail_attention
from trainer.model.turn_cache import TurnCache
from trainer.sampling.own_decoder import OwnDecoder
from trainer.sampling.sampler import SampleRequest

TAILS = ((7, 8, 9), (11,), (12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22), (7, 30), (40, 41, 42, 43))
NUM_TURNS = 3


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory):
    def make(arch: str) -> Any:
        lora = LoraSettings(rank=4, target_modules=["q_proj", "v_proj", "o_proj"])
        return tiny_policy(tiny_model_dir(tmp_path_factory.mktemp(arch), arch, scale=8.0), lora)

    return make


class Played:
    """Five conversations; each turn's requests and completions, and how many tokens each turn read before drawing."""

    def __init__(self, sampler: Any, caches: list[TurnCache | None], forget: int | None = None) -> None:
        self.turns: list[tuple[list[SampleRequest], list[Any]]] = []
        self.num_read: list[int] = []
        prompts = [prompt(number) for number in range(len(TAILS))]
        start = sampler.decoder.start

        def counted(*arguments: Any) -> Any:
            rows = start(*arguments)
            if isinstance(sampler.decoder, OwnDecoder):
                return rows
            backbone = rows._backbone
            seen: list[int] = []

            def count(ids: torch.Tensor, positions: torch.Tensor, layout: Any) -> torch.Tensor:
                seen.append(len(ids))
                if len(seen) == 1:
                    self.num_read.append(len(ids))
                return backbone(ids, positions, layout)

            rows._backbone = count
            return rows

        sampler.decoder.start = counted
        for turn in range(NUM_TURNS):
            asked = [
                SampleRequest(ids, row, 1, 0, turn, cache)
                for row, (ids, cache) in enumerate(zip(prompts, caches, strict=True))
            ]
            groups = sampler.sample(asked, replace(PARAMS, max_completion_tokens=12))
            self.turns.append((asked, groups))
            prompts = [
                (*ids, *done.token_ids, *tail) for ids, (done,), tail in zip(prompts, groups, TAILS, strict=True)
            ]
            if forget is not None:  # a template that dropped what was said
                prompts[forget] = (*prompt(forget)[:4], 5, 6, 7)
        sampler.decoder.start = start

    @property
    def tokens(self) -> list[list[tuple[int, ...]]]:
        return [[completion.token_ids for (completion,) in groups] for _, groups in self.turns]


def caches() -> list[TurnCache | None]:
    return [TurnCache() for _ in TAILS]


@pytest.mark.parametrize("arch", FAMILIES)
def test_logprobs_of_every_turn_are_those_of_the_policy(policy_of, arch):
    """Windows of 8 tokens, soft caps, sinks, experts; conversations whose turns and tails have unequal lengths."""
    policy = policy_of(arch)
    played = Played(published(policy), caches(), forget=1)
    for asked, groups in played.turns:
        assert (logprobs_of(groups) - scored(policy, asked, groups, 1.0)).abs().max() < 1e-4


def test_a_turn_reads_what_is_new_and_nothing_else(policy_of):
    policy = policy_of("llama")
    again, kept = Played(published(policy), [None] * 5), Played(published(policy), caches())
    assert kept.tokens == again.tokens
    first = sum(len(prompt(number)) for number in range(5))
    tails = sum(map(len, TAILS))
    assert kept.num_read == [first, tails + 5, tails + 5], "the last drawn token of each was never read before"
    assert again.num_read[1] > first + tails


def test_turn_0_has_the_bits_of_a_run_without_cache(policy_of):
    policy = policy_of("llama")
    (_, plain), *_ = Played(published(policy), [None] * 5).turns
    (_, kept), *_ = Played(published(policy), caches()).turns
    assert plain == kept


def test_what_a_template_dropped_is_read_again_from_the_first_change(policy_of):
    played = Played(published(policy_of("llama")), caches(), forget=2)
    # of 30 tokens of conversation 2 the first four are kept; it reads three new ones in each later turn
    assert played.num_read[1] == sum(len(tail) + 1 for index, tail in enumerate(TAILS) if index != 2) + 3


def test_another_policy_never_uses_the_cache(policy_of):
    policy, all_caches = policy_of("llama"), caches()
    sampler = published(policy)
    Played(sampler, all_caches)
    for parameter in policy.trained_parameters().values():
        parameter.data += 0.2
    sampler.publish(policy, 1)
    asked = [SampleRequest(prompt(row), row, 1, 0, 0, cache) for row, cache in enumerate(all_caches)]
    groups = sampler.sample(asked, PARAMS)
    assert (logprobs_of(groups) - scored(policy, asked, groups, 1.0)).abs().max() < 1e-4


def test_long_tails_are_computed_in_parts(policy_of, monkeypatch):
    policy = policy_of("gemma2")
    whole = Played(published(policy), caches())
    monkeypatch.setattr(tail_attention, "MAX_CELLS", 700)
    parts = Played(published(policy), caches())
    assert parts.tokens == whole.tokens
    for asked, groups in parts.turns:
        assert (logprobs_of(groups) - scored(policy, asked, groups, 1.0)).abs().max() < 1e-4


def test_a_decoder_with_a_cache_of_its_own_keeps_nothing(policy_of):
    policy, all_caches = policy_of("llama"), caches()
    sampler = published(policy)
    sampler.decoder = OwnDecoder(policy, is_cached=True)
    played = Played(sampler, all_caches)
    assert all(cache is not None and not cache.token_ids for cache in all_caches)
    assert played.tokens == Played(published(policy), caches()).tokens
