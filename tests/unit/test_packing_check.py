"""The leak test before step 1: it passes what packs, and refuses what leaks."""

from __future__ import annotations

import pytest
import torch
from tiny import ComputeDtype, tiny_model, tiny_model_dir

from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.errors import ModelError, NumericalError
from trainer.model.batch import Batch
from trainer.model.lm_head import tiled_logprobs
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
    with pytest.raises(NumericalError, match="packed neighbours leak: logprobs move by"):
        verify_packing(rounding(tiny_model_dir(tmp_path, "llama")), CPU)


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


def test_the_cache_switched_on_leaks_and_is_refused(own_attention):
    # With a cache, transformers builds no block mask: the second sequence sees the first.
    own_attention.use_cache = True
    with pytest.raises(NumericalError, match=r"packed neighbours leak: logprobs move by [0-9.]+ on average"):
        verify_packing(own_attention, CPU)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["qwen3_next", "lfm2"])
def test_state_that_runs_over_the_border_is_refused(tmp_path, arch, compute_dtype):
    policy = load(tiny_model_dir(tmp_path, arch), compute_dtype=compute_dtype)
    with pytest.raises(NumericalError, match="packed neighbours leak"):
        verify_packing(policy, CPU)


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


def test_code_with_attention_of_its_own_is_refused_when_it_is_loaded(tmp_path):
    with pytest.raises(ModelError, match="the model's code chooses attention by itself"):
        load(tiny_model_dir(tmp_path, "falcon"))


def test_code_that_needs_a_mask_is_refused_by_name(tmp_path):
    policy = load(tiny_model_dir(tmp_path, "mpt"))
    with pytest.raises(ModelError, match="MptForCausalLM cannot run packed sequences"):
        verify_packing(policy, CPU)


def test_a_model_that_passes_no_layout_is_refused_by_the_layer(tmp_path):
    policy = load(tiny_model_dir(tmp_path, "stablelm"))
    with pytest.raises(ModelError, match="StableLmAttention does not pass the pack's layout"):
        verify_packing(policy, CPU)
