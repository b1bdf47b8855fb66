"""TRL's GRPOTrainer as oracle: the same tokens give the same loss and the same gradient of the adapter.

TRL's own `_compute_loss` runs, in training mode, on one process without gradient accumulation, where its normalisers
are the papers'. The batch has unequal lengths, ratios on both sides of the bounds, advantages of both signs, a nonzero
adapter and the KL term: an on-policy batch would agree with anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.algorithms import (
    PRESETS,
    PolicyTokens,
    ResolvedAlgorithm,
    denominator,
    group_advantages,
    policy_terms,
    token_weights,
    truncated_weights,
)

PROMPT_LENGTHS = (3, 5, 4, 2)
COMPLETION_LENGTHS = (6, 2, 9, 4)
ADVANTAGES = (1.3, -0.7, 0.4, -1.1)
MAX_COMPLETION_TOKENS = 12
VOCABULARY = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


@dataclass(frozen=True)
class Case:
    """One way to ask TRL for an algorithm, and the same in our words."""

    name: str
    trl: dict[str, object]
    ours: ResolvedAlgorithm


CASES = [
    Case(
        "grpo",
        {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.25, "use_bias_correction_kl": False},
        replace(PRESETS["grpo"], clip_low=0.2, clip_high=0.25),
    ),
    Case(
        "dapo",
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "use_bias_correction_kl": False},
        PRESETS["dapo"],
    ),
    Case(
        "dr_grpo",
        {"loss_type": "dr_grpo", "epsilon": 0.2, "use_bias_correction_kl": False},
        PRESETS["dr_grpo"],
    ),
    Case(  # TRL's epsilon_high is the cap itself for this loss, ours is the cap less 1
        "cispo",
        {"loss_type": "cispo", "epsilon_high": 1.3, "use_bias_correction_kl": False},
        replace(PRESETS["cispo"], clip_high=0.3),
    ),
    Case(  # not the paper's 3e-4 and 4e-4, under which every completion of this batch would be outside
        "gspo",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.1,
            "epsilon_high": 0.15,
            "use_bias_correction_kl": False,
        },
        replace(PRESETS["gspo"], clip_low=0.1, clip_high=0.15),
    ),
    Case(  # TRL's own default for the KL term
        "grpo_corrected_kl",
        {"loss_type": "grpo", "epsilon": 0.2, "use_bias_correction_kl": True},
        replace(PRESETS["grpo"], kl_estimator="k3_corrected"),
    ),
]
KL_COEF = 0.3


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
    """A function from TRL's settings to a real GRPOTrainer of a tiny random model with a nonzero adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        from huggingface_hub import constants

        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # another test may have imported it before
        from peft import LoraConfig
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        from datasets import Dataset

        words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

        def make(**settings):
            torch.manual_seed(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(VOCABULARY),
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    initializer_range=0.3,
                    bos_token_id=None,
                    eos_token_id=1,
                    pad_token_id=0,
                )
            )
            args = GRPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                per_device_train_batch_size=len(PROMPT_LENGTHS),
                num_generations=2,
                max_completion_length=MAX_COMPLETION_TOKENS,
                beta=KL_COEF,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                **settings,
            )
            trainer = GRPOTrainer(
                model=model,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=args,
                train_dataset=Dataset.from_list([{"prompt": "a b"}] * 4),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            )
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in adapter_of(trainer.model).values():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            trainer.current_gradient_accumulation_steps = 1  # what Trainer's loop sets before the first step
            trainer.model.train()
            return trainer

        yield make


def adapter_of(model) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = [p + c for p, c in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)]
    return [torch.randint(3, len(VOCABULARY), (length,), generator=generator) for length in lengths]


def packed_logprobs(model, sequences: list[Tensor]) -> Tensor:
    """[N] of the completions' tokens, each sequence on its own: no padding, none of TRL's code."""
    rows = []
    for sequence, prompt_length in zip(sequences, PROMPT_LENGTHS, strict=True):
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, prompt_length - 1 : -1]
        targets = sequence[prompt_length:, None]
        rows.append(logits.log_softmax(-1).gather(1, targets).squeeze(1))
    return torch.cat(rows)


def make_tokens(model, sequences: list[Tensor]) -> PolicyTokens:
    logprobs = packed_logprobs(model, sequences)
    with torch.no_grad(), model.disable_adapter():
        ref_logprobs = packed_logprobs(model, sequences)
    generator = torch.Generator().manual_seed(3)
    drift = torch.tensor([0.25, 0.25, -0.2, -0.05])  # per completion, so that sequence ratios leave their bounds too
    sequence_ids = torch.arange(len(sequences)).repeat_interleave(torch.tensor(COMPLETION_LENGTHS))
    noise = 0.3 * torch.randn(logprobs.shape, generator=generator)
    return PolicyTokens(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() - drift[sequence_ids] - noise,
        ref_logprobs=ref_logprobs,
        advantages=torch.tensor(ADVANTAGES)[sequence_ids],
        sequence_ids=sequence_ids,
    )


def our_loss(tokens: PolicyTokens, preset: ResolvedAlgorithm) -> Tensor:
    terms = policy_terms(tokens, replace(preset, kl_coef=KL_COEF))
    clip_frac = terms.metrics["clip_frac"].mean()
    assert 0 < clip_frac < 1, f"a batch that is clipped nowhere or everywhere proves little: {clip_frac}"
    weights = token_weights(preset.normalizer, tokens.sequence_ids)
    return (weights * terms.loss).sum() / denominator(
        preset.normalizer,
        num_tokens=tokens.logprobs.numel(),
        num_sequences=len(COMPLETION_LENGTHS),
        max_completion_tokens=MAX_COMPLETION_TOKENS,
    )


def pad(rows: list[Tensor], *, side: str) -> tuple[Tensor, Tensor]:
    """Rows as TRL wants them, prompts padded on the left, completions on the right; and the mask."""
    kwargs: dict[str, Any] = {"batch_first": True, "padding_side": side}
    padded = torch.nn.utils.rnn.pad_sequence(rows, padding_value=0, **kwargs)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.long) for row in rows], **kwargs)
    return padded, mask


def trl_inputs(sequences: list[Tensor], tokens: PolicyTokens) -> dict[str, Tensor]:
    pairs = list(zip(sequences, PROMPT_LENGTHS, strict=True))
    prompt_ids, prompt_mask = pad([sequence[:length] for sequence, length in pairs], side="left")
    completion_ids, completion_mask = pad([sequence[length:] for sequence, length in pairs], side="right")

    def as_rows(packed: Tensor) -> Tensor:
        return pad(list(packed.split(COMPLETION_LENGTHS)), side="right")[0]

    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": as_rows(tokens.old_logprobs),
        "ref_per_token_logps": as_rows(tokens.ref_logprobs),
        "num_items_in_batch": completion_mask.sum(),
    }
    if tokens.sampler_weights is not None:
        inputs["importance_sampling_ratio"] = as_rows(tokens.sampler_weights)
    return inputs


def gradients(loss: Tensor, model) -> dict[str, Tensor]:
    adapter = adapter_of(model)
    return dict(zip(adapter, torch.autograd.grad(loss, list(adapter.values())), strict=True))


def assert_same_loss_and_gradients(
    trainer, sequences: list[Tensor], tokens: PolicyTokens, preset: ResolvedAlgorithm
) -> None:
    ours = our_loss(tokens, preset)
    our_gradients = gradients(ours, trainer.model)
    theirs = trainer._compute_loss(trainer.model, trl_inputs(sequences, tokens))
    their_gradients = gradients(theirs, trainer.model)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(our_gradients) == 28  # A and B of seven projections in two layers
    for name, expected in their_gradients.items():
        assert expected.abs().max() > 1e-4, f"{name} has no gradient to compare"
        torch.testing.assert_close(our_gradients[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_adapter_gradient_are_trls(case, make_trainer):
    trainer = make_trainer(**case.trl)
    sequences = make_sequences()
    tokens = make_tokens(trainer.model, sequences)
    assert_same_loss_and_gradients(trainer, sequences, tokens, case.ours)


def test_mismatch_correction_is_trls(make_trainer):
    trainer = make_trainer(
        loss_type="dapo",
        use_bias_correction_kl=False,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1.2,
    )
    trainer.use_vllm = True  # after construction, which would start an engine; the loss reads the flag only
    sequences = make_sequences()
    tokens = make_tokens(trainer.model, sequences)
    noise = 0.3 * torch.randn(tokens.old_logprobs.shape, generator=torch.Generator().manual_seed(4))
    weights = truncated_weights(tokens.old_logprobs, tokens.old_logprobs + noise, cap=1.2)
    tokens = replace(tokens, sampler_weights=weights)
    preset = replace(PRESETS["dapo"], clip_high=0.2)
    assert_same_loss_and_gradients(trainer, sequences, tokens, preset)


def test_group_std_advantages_are_trls(make_trainer):
    from trl.trainer.utils import nanstd

    rewards = [[1.0, 0.0, 0.5, 0.25], [0.2, 0.9, float("nan"), 0.4]]  # NaN is TRL's word for a failed rollout
    table = torch.tensor(rewards, dtype=torch.float64)
    theirs = (table - table.nanmean(1, keepdim=True)) / (nanstd(table, dim=1, keepdim=True) + 1e-4)
    ours = group_advantages(
        [[None if reward != reward else reward for reward in group] for group in rewards], "group_std"
    )
    assert [[0.0 if a is None else a for a in group] for group in ours] == [
        pytest.approx(group) for group in theirs.nan_to_num(nan=0.0).tolist()
    ]
