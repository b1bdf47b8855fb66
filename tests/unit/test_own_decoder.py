"""Sampling where the fast decoders are wrong: the model's own forward pass, found by a trial before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model_dir, tiny_tokenizer

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.model.batch import Batch
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Policy, load_policy, score
from trainer.sampling.local import LocalSampler
from trainer.sampling.own_decoder import OwnDecoder
from trainer.sampling.sampler import SampleRequest, SamplingParams

CPU = torch.device("cpu")
PARAMS = SamplingParams(max_completion_tokens=12, stop_ids=frozenset(range(40)), seed=0, step=0)
"""A completion ends at one token of eight, so that rows leave the batch at different times."""
PROMPTS = (tuple(range(50, 63)), tuple(range(90, 94)), tuple(range(50, 63)))
"""The first one comes twice."""
pytestmark = pytest.mark.filterwarnings(
    # PEFT writes patterns for fused experts that it then reports as unmatched.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)


def moved_policy(path: Path, arch: str) -> Policy:
    """A policy as a run opens it, whose adapter is not zero."""
    settings = ModelSettings(path=str(tiny_model_dir(path, arch, scale=8.0)), compute_dtype="float32")
    policy = load_policy(settings, LoraSettings(rank=2), 0, CPU)
    verify_packing(policy, CPU)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.add_(0.02)
    return policy


def sampled(sampler: LocalSampler, prompts: tuple[tuple[int, ...], ...], first_row: int = 0):
    requests = [SampleRequest(prompt, first_row + row, 3) for row, prompt in enumerate(prompts)]
    return sampler.sample(requests, PARAMS)


def published(policy: Policy) -> LocalSampler:
    sampler = LocalSampler(policy, tiny_tokenizer())
    sampler.publish(policy, 0)
    return sampler


@pytest.mark.parametrize("arch", ["lfm2", "qwen3_next", "mamba2", "diffllama", "falcon", "mpt"])
def test_recorded_logprobs_are_the_policys(tmp_path, arch):
    policy = moved_policy(tmp_path, arch)
    sampler = published(policy)
    assert isinstance(sampler.decoder, OwnDecoder)
    groups = sampled(sampler, PROMPTS)
    lengths = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            lengths.add(len(completion.token_ids))
            mask = (False,) * len(prompt) + (True,) * len(completion.token_ids)
            batch = Batch.pack([TokenSequence(prompt + completion.token_ids, mask)], CPU)
            ours = torch.tensor(completion.logprobs)
            torch.testing.assert_close(ours, score(policy, batch, 1.0), atol=1e-3, rtol=0)
    assert len(lengths) > 2


def test_a_completion_does_not_depend_on_what_is_sampled_beside_it(tmp_path):
    sampler = published(moved_policy(tmp_path, "lfm2"))
    alone = sampled(sampler, PROMPTS[1:2], first_row=1)[0]
    together = sampled(sampler, PROMPTS)[1]
    assert [each.token_ids for each in alone] == [each.token_ids for each in together]


def test_the_decoder_follows_the_policy(tmp_path):
    policy = moved_policy(tmp_path, "lfm2")
    sampler = published(policy)
    before = sampled(sampler, PROMPTS)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.add_(0.1)
    sampler.publish(policy, 1)
    assert sampled(sampler, PROMPTS) != before


@pytest.mark.parametrize(
    ("arch", "note"),
    [
        ("lfm2", "with its own cache (lfm2 keeps state between packed sequences)"),
        ("diffllama", "with its own cache (the fast decoder differs from the policy by"),
        ("llama", None),
    ],
)
def test_the_user_reads_why_sampling_is_slow(tmp_path, arch, note):
    said = published(moved_policy(tmp_path, arch)).note
    assert (said is None) if note is None else (said is not None and note in said)


def test_without_a_usable_cache_every_token_is_a_pass_over_the_sequence(tmp_path, monkeypatch):
    policy = moved_policy(tmp_path, "lfm2")
    monkeypatch.setattr("trainer.model.own_forward.CACHES", ())
    sampler = published(policy)
    assert sampler.note is not None
    assert "with a pass over the whole sequence for each token" in sampler.note
    monkeypatch.undo()
    cached = sampled(published(policy), PROMPTS)
    assert [[each.token_ids for each in group] for group in sampled(sampler, PROMPTS)] == [
        [each.token_ids for each in group] for group in cached
    ]


def test_all_linear_leaves_out_what_a_mamba_mixer_reads_without_calling(tmp_path):
    policy = moved_policy(tmp_path, "mamba2")
    assert policy.left_out == ["out_proj"]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in policy.trained_parameters()}
    assert adapted == {"in_proj"}
