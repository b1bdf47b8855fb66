"""The leak test before step 1: it passes what packs, and refuses what leaks."""

from __future__ import annotations

import pytest
import torch
from tiny import ComputeDtype, tiny_model, tiny_model_dir
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.errors import NumericalError
from trainer.model.batch import Batch
from trainer.model.lm_head import tiled_logprobs
from trainer.model.own_forward import own_logprobs
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Policy, Scores, load_policy

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    # PEFT writes patterns for fused experts that it then reports as unmatched.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)


def load(path, *, compute_dtype: ComputeDtype = "float32", lora: LoraSettings | None = None) -> Policy:
    settings = ModelSettings(path=str(path), compute_dtype=compute_dtype)
    return load_policy(settings, lora or LoraSettings(rank=2), 0, CPU)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "mixtral", "gemma2", "gpt_oss"])
def test_models_that_pack_pass(tmp_path, arch, compute_dtype):
    policy = load(tiny_model_dir(tmp_path, arch), compute_dtype=compute_dtype)
    verify_packing(policy, CPU)
    assert policy.causal_lm.config._attn_implementation == "tunesmith_packed"  # and is as it was


class RoundingByNeighbour(Policy):  # type: ignore[misc]  # a test may extend a final class
    """Rounds a little otherwise when the first sequence changes, as matrix products of another size do."""

    def forward(self, batch: Batch, *, temperature: float = 1.0, with_entropy: bool = False) -> Scores:
        scores = super().forward(batch, temperature=temperature, with_entropy=with_entropy)
        return Scores(scores.logprobs + 1e-6 * batch.token_ids[0], scores.entropy)


def rounding(path) -> Policy:
    policy = load(path)
    return RoundingByNeighbour(policy.causal_lm, policy.adapters, policy.model_path)


def test_rounding_by_the_neighbour_is_no_leak_where_there_are_experts(tmp_path):
    # The neighbour's tokens decide how many rows each expert's matrix product has.
    verify_packing(rounding(tiny_model_dir(tmp_path, "mixtral")), CPU)


def test_rounding_by_the_neighbour_is_a_leak_where_there_are_none(tmp_path):
    policy = rounding(tiny_model_dir(tmp_path, "llama"))
    verify_packing(policy, CPU)
    assert policy.separate_reason == "llama does not separate packed sequences"


class OwnAttention(Policy):  # type: ignore[misc]
    """The model under transformers' own attention, which knows sequences by their positions."""

    use_cache = False

    def forward(self, batch: Batch, *, temperature: float = 1.0, with_entropy: bool = False) -> Scores:
        output = self.causal_lm.base_model(
            input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=self.use_cache
        )
        hidden = output.last_hidden_state[0].index_select(0, batch.scored)
        head = self.causal_lm.get_output_embeddings()
        scores = tiled_logprobs(
            hidden, head.weight, head.bias, batch.targets, self.logit_transform, with_entropy=with_entropy
        )
        return Scores(*scores)


@pytest.fixture
def own_attention() -> OwnAttention:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    return OwnAttention(model, None, "tiny")


def test_the_cache_switched_off_passes(own_attention):
    verify_packing(own_attention, CPU)


def test_the_cache_switched_on_leaks(own_attention):
    # With a cache, transformers builds no block mask: the second sequence sees the first.
    own_attention.use_cache = True
    verify_packing(own_attention, CPU)
    assert own_attention.separate_reason == "llama does not separate packed sequences"


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["qwen3_next", "lfm2"])
def test_state_that_runs_over_the_border_separates_the_sequences(tmp_path, arch, compute_dtype):
    policy = load(tiny_model_dir(tmp_path, arch), compute_dtype=compute_dtype)
    verify_packing(policy, CPU)
    assert policy.separate_reason == f"{arch} keeps state between packed sequences"
    assert policy.pack_limit(1024) == 1


def test_what_packing_leaves_out_is_refused(tmp_path, monkeypatch):
    policy = load(tiny_model_dir(tmp_path, "gemma2"))
    transform = policy.logit_transform
    other = type(transform)(scale=transform.scale * 1.1, softcap=transform.softcap)
    monkeypatch.setattr(policy, "logit_transform", other)
    with pytest.raises(NumericalError, match="differ from the model's own forward pass by"):
        verify_packing(policy, CPU)


def test_nothing_finite_is_no_pass(tmp_path):
    policy = load(tiny_model_dir(tmp_path))
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="nan"):
        verify_packing(policy, CPU)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("falcon", "falcon chooses its attention by itself"),
        ("mpt", "mpt cannot run packed sequences (AttributeError: 'NoneType' object has no attribute 'to')"),
        ("stablelm", "StableLmAttention does not pass the pack's layout to attention: model not supported"),
    ],
)
def test_code_that_cannot_pack_runs_sequences_one_by_one_as_plain_transformers(tmp_path, arch, reason):
    policy = load(tiny_model_dir(tmp_path, arch))
    verify_packing(policy, CPU)
    assert policy.separate_reason is not None
    assert reason in policy.separate_reason
    sequence = TokenSequence(tuple(range(3, 23)), (True,) * 20)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours = policy(Batch.pack([sequence], CPU)).logprobs
        torch.testing.assert_close(ours, own_logprobs(plain, sequence.token_ids, CPU), atol=1e-4, rtol=0)


def test_a_window_that_attention_does_not_get_separates_only_where_sequences_are_longer(tmp_path):
    for max_seq_tokens, is_packed in ((8192, False), (512, True)):
        policy = load(tiny_model_dir(tmp_path, "qwen2_moe", sliding_window=1024))
        verify_packing(policy, CPU, max_seq_tokens)
        assert (policy.separate_reason is None) is is_packed


def test_a_model_that_sees_later_tokens_is_refused(tmp_path, monkeypatch):
    policy = load(tiny_model_dir(tmp_path))
    policy.run_separately("a test")
    policy.causal_lm.set_attn_implementation("eager")  # without a mask it is not causal
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_args, **_kwargs: None)
    with pytest.raises(NumericalError, match=r"logprobs change by .* when a later token changes"):
        verify_packing(policy, CPU)


ROTARY = {"rope_theta": 10000.0}
LONG_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 6.0, 9.0]}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("longrope", {**LONG_FACTORS, "original_max_position_embeddings": 16}),
        ("dynamic", {"factor": 4.0}),
    ],
)
def test_rotary_factors_are_those_of_each_sequence(tmp_path, kind, fields):
    positions = 64 if kind == "longrope" else 16
    rotary = {**ROTARY, "rope_type": kind, **fields}
    tiny_model_dir(tmp_path, "llama", max_position_embeddings=positions, rope_parameters=rotary)
    short = load(tmp_path)
    verify_packing(short, CPU, 16)
    assert short.separate_reason is None
    policy = load(tmp_path)
    verify_packing(policy, CPU, 40)
    assert policy.separate_reason is not None
    assert "other rotary factors" in policy.separate_reason
    for length in (40, 12, 24, 16, 17):  # what came before must not matter
        sequence = TokenSequence(tuple(range(3, 3 + length)), (True,) * length)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        ours = policy(Batch.pack([sequence], CPU)).logprobs
        torch.testing.assert_close(ours, own_logprobs(plain, sequence.token_ids, CPU), atol=1e-4, rtol=0)
