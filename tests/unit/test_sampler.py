"""The local sampler draws from the policy it was given, whatever is sampled beside."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from chi_square import excess
from sampled import CPU, FAMILIES, PARAMS, STOP_IDS, logprobs_of, prompt, published, scored, tiny_policy
from tiny import tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.errors import NumericalError
from trainer.model.base_model import load_base
from trainer.model.batch import Batch
from trainer.model.policy import Policy, load_policy
from trainer.sampling.decoder import CopiedDecoder
from trainer.sampling.fused import FusedDecoder
from trainer.sampling.sampler import SampleRequest, decoded


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    def make(arch: str):
        return tiny_model_dir(tmp_path_factory.mktemp(arch), arch, scale=8.0)

    return make


def float64_policy(path) -> Policy:
    return Policy(load_base(ModelSettings(path=str(path), compute_dtype="float32"), CPU).double(), None, str(path))


def requests(numbers, num_samples: int = 3) -> list[SampleRequest]:
    return [SampleRequest(prompt(number), number, num_samples) for number in numbers]


@pytest.mark.parametrize("arch", FAMILIES)
def test_logprobs_are_those_of_the_policy_with_its_adapter(model_dir, arch):
    """Windows, soft caps, sinks and experts; rows of unequal prompts that end at many lengths."""
    policy = tiny_policy(model_dir(arch), LoraSettings(rank=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    asked = requests(range(5))
    groups = published(policy).sample(asked, replace(PARAMS, temperature=0.7))

    lengths = {len(completion.token_ids) for group in groups for completion in group}
    assert len(lengths) > 3
    assert {completion.finish_reason for group in groups for completion in group} == {"stop", "length"}
    assert (logprobs_of(groups) - scored(policy, asked, groups, 0.7)).abs().max() < 1e-4
    with policy.adapter_off():
        assert (logprobs_of(groups) - scored(policy, asked, groups, 0.7)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arch", "decoder"), [("llama", FusedDecoder), ("qwen3", FusedDecoder), ("gemma2", CopiedDecoder)]
)
def test_decoder_of(model_dir, arch, decoder):
    assert type(published(tiny_policy(model_dir(arch))).decoder) is decoder


@pytest.mark.parametrize(
    "lora", [LoraSettings(rank=4), LoraSettings(rank=4, dora=True), LoraSettings(rank=4, rslora=True), None]
)
def test_logprobs_are_those_of_the_policy_with_any_adapter(model_dir, lora):
    policy = tiny_policy(model_dir("llama"), lora)
    asked = requests([1, 0])
    groups = published(policy).sample(asked, PARAMS)
    assert (logprobs_of(groups) - scored(policy, asked, groups, 1.0)).abs().max() < 1e-4


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_logprobs_stay_those_of_the_untruncated_distribution(model_dir, cut):
    policy = tiny_policy(model_dir("llama"))
    asked = requests([1, 0])
    groups = published(policy).sample(asked, replace(PARAMS, **cut))
    assert groups != published(policy).sample(asked, PARAMS)
    assert (logprobs_of(groups) - scored(policy, asked, groups, 1.0)).abs().max() < 1e-4


@pytest.mark.parametrize("numbers", [[0], [6], [2, 0, 5], [6, 5, 4, 3, 2, 1, 0]])
def test_tokens_do_not_depend_on_what_is_sampled_beside(model_dir, numbers):
    """In float64, where another number of rows changes no bit that decides a token."""
    sampler = published(float64_policy(model_dir("llama")))
    together = sampler.sample(requests(range(7)), PARAMS)
    found = sampler.sample(requests(numbers), PARAMS)
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in together[n]] for n in numbers]


def test_tokens_do_not_depend_on_the_group_size(model_dir):
    sampler = published(float64_policy(model_dir("llama")))
    three, eight = (sampler.sample(requests([4], size), PARAMS)[0] for size in (3, 8))
    assert [c.token_ids for c in three] == [c.token_ids for c in eight[:3]]


@pytest.mark.parametrize("change", [{"seed": 9}, {"step": 9}])
def test_another_seed_or_step_draws_others(model_dir, change):
    sampler = published(tiny_policy(model_dir("llama")))
    assert sampler.sample(requests([0]), PARAMS) != sampler.sample(requests([0]), replace(PARAMS, **change))


def test_same_prompt_in_two_rows_draws_others_and_reads_it_once(model_dir):
    sampler = published(tiny_policy(model_dir("llama")))
    first, second, third = sampler.sample(
        [
            SampleRequest(prompt(0), 0, 2),
            SampleRequest(prompt(0), 1, 2),
            SampleRequest(prompt(0), 0, 2, first_sample=2),
        ],
        PARAMS,
    )
    assert len({completion.token_ids for group in (first, second, third) for completion in group}) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_tokens_follow_the_policys_distribution(model_dir, dtype):
    policy = load_policy(ModelSettings(path=str(model_dir("llama")), compute_dtype=dtype), None, 0, CPU)
    draws = published(policy).sample([SampleRequest(prompt(0), 0, 4000)], replace(PARAMS, max_completion_tokens=1))[0]

    with torch.no_grad():
        logits = (
            policy.causal_lm.base_model(
                input_ids=torch.tensor([prompt(0)]),
                position_ids=torch.arange(len(prompt(0)))[None],
                use_cache=False,
                packed=Batch.pack([TokenSequence(prompt(0), (True,) * 5)], CPU).layout,
            ).last_hidden_state[0, -1]
            @ policy.causal_lm.get_output_embeddings().weight.T
        )
    probabilities = logits.double().softmax(-1)
    counts = torch.tensor([draw.token_ids[0] for draw in draws]).bincount(minlength=len(probabilities))
    assert excess(counts, probabilities) < 4.0


def test_greedy_takes_the_likeliest(model_dir):
    policy = tiny_policy(model_dir("llama"))
    asked = requests([1], 2)
    first, second = published(policy).sample(asked, replace(PARAMS, is_greedy=True))[0]
    assert first == second
    sequence = list(prompt(1) + first.token_ids)
    pack = Batch.pack([TokenSequence(tuple(sequence), (True,) * len(sequence))], CPU)
    with torch.no_grad():
        hidden = policy.causal_lm.base_model(
            input_ids=pack.token_ids[None], position_ids=pack.positions[None], use_cache=False, packed=pack.layout
        ).last_hidden_state[0]
    likeliest = policy.causal_lm.get_output_embeddings()(hidden).argmax(-1).tolist()
    assert likeliest[len(prompt(1)) - 1 : -1] == list(first.token_ids)


def test_stop_token_ends_a_completion_and_belongs_to_it(model_dir):
    for completion in published(tiny_policy(model_dir("llama"))).sample(requests([0, 1], 8), PARAMS)[0]:
        assert not STOP_IDS & set(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in STOP_IDS) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == len(completion.logprobs) <= 24


def test_stop_string_ends_with_the_token_that_completes_it(model_dir):
    sampler = published(tiny_policy(model_dir("llama")))
    params = replace(PARAMS, stop_ids=frozenset({2}))
    free = sampler.sample(requests([0, 1, 2, 3]), params)
    text = sampler.tokenizer.decode(free[2][1].token_ids[4:7])  # a string over three tokens of one answer
    stopped = sampler.sample(requests([0, 1, 2, 3]), replace(params, stop=("never drawn", text)))

    assert stopped[2][1].token_ids == free[2][1].token_ids[:7]
    assert stopped[2][1].finish_reason == "stop"
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]


def test_text_has_no_special_tokens(model_dir):
    sampler = published(tiny_policy(model_dir("llama")))
    completion = sampler.sample(requests([0], 1), replace(PARAMS, stop_ids=frozenset(range(320))))[0][0]
    ids = (*sampler.tokenizer("the answer")["input_ids"], 2)
    assert decoded(sampler.tokenizer, ids) == "the answer"
    assert completion.text == decoded(sampler.tokenizer, completion.token_ids)


def test_completions_carry_the_version_and_change_only_when_published(model_dir):
    policy = tiny_policy(model_dir("llama"), LoraSettings(rank=4))
    sampler = published(policy, 7)
    before = sampler.sample(requests([0]), PARAMS)
    for parameter in policy.trained_parameters().values():
        parameter.data.mul_(-1.5)
    assert sampler.sample(requests([0]), PARAMS) == before
    sampler.publish(policy, 8)
    after = sampler.sample(requests([0]), PARAMS)
    assert before[0][0].policy_version == 7
    assert after[0][0].policy_version == 8
    assert (logprobs_of(after) - scored(policy, requests([0]), after, 1.0)).abs().max() < 1e-4


def test_full_parameters_are_published_too(model_dir):
    policy = tiny_policy(model_dir("llama"))
    sampler = published(policy)
    for parameter in policy.trained_parameters().values():
        parameter.data.mul_(1.1)
    sampler.publish(policy, 1)
    groups = sampler.sample(requests([0]), PARAMS)
    assert (logprobs_of(groups) - scored(policy, requests([0]), groups, 1.0)).abs().max() < 1e-4


def test_sampling_leaves_the_policy_as_it_was(model_dir):
    policy = tiny_policy(model_dir("llama"), LoraSettings(rank=4))
    policy.train()
    before = {name: value.clone() for name, value in policy.named_parameters()}
    published(policy).sample(requests([0]), PARAMS)
    assert policy.training
    assert all(torch.equal(value, before[name]) for name, value in policy.named_parameters())
    assert policy.trained_parameters()


def test_broken_weights_are_an_error_not_tokens(model_dir):
    policy = tiny_policy(model_dir("llama"))
    next(iter(policy.trained_parameters().values())).data.fill_(math.nan)
    with pytest.raises(NumericalError, match="not finite"):
        published(policy).sample(requests([0]), PARAMS)


def test_nothing_asked_nothing_drawn(model_dir):
    assert published(tiny_policy(model_dir("llama"))).sample([], PARAMS) == []
