"""TRL's SFTTrainer as oracle: the same rows give the same trained tokens, the same loss and the same gradient.

TRL pads, we pack. Rows have unequal lengths and the adapter is not zero: rows of one length, or a fresh adapter, whose
first matrix has no gradient, would prove little.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import PeftModel
from tiny import tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from trainer.config.recipe import DataSettings, DataSource, LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.chat import ChatEncoder
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.model.batch import Batch
from trainer.model.policy import load_policy
from trainer.training.learner import Learner
from trainer.training.losses import sft_loss
from trainer.training.schedule import AdamParams
from trainer.types import Row

CPU = torch.device("cpu")
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """Rows, and how we and TRL are told what is trained."""

    name: str
    rows: tuple[dict[str, Any], ...]
    template: str | None
    data: dict[str, Any]
    trl: dict[str, Any]


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}


CHATS = (
    chat("what is the sum of 8 and 90?", "the answer is 98."),
    chat("hi", "hello", "how many birds?", "34 birds and 567 fish, and the lazy dog sees them all."),
    chat("the quick brown fox jumps over what? answer with one word", "dog"),
    chat("a", "b", "c", "d", "e", "f"),
)
TEXTS = (
    {"prompt": "the sum of 8 and 90 is", "completion": " 98."},
    {"prompt": "a", "completion": " the quick brown fox jumps over the lazy dog"},
    {"prompt": "the quick brown fox jumps over the lazy", "completion": " dog"},
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own template with markers, which TRL needs."""
QWEN3 = re.sub(
    r"\{\{- '<\|im_end\|>\\n' \}\}\s*\{%- endgeneration %\}",
    r"{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}",
    (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text(encoding="utf-8"),
)
"""The training form of TRL, which keeps reasoning in earlier turns; the line break after a turn is not trained."""
CASES = [
    Case("smollm2", CHATS, None, {}, {"assistant_only_loss": True}),
    Case("qwen3", CHATS, QWEN3, {}, {"assistant_only_loss": True}),
    Case("text", TEXTS, None, {"format": "text"}, {"completion_only_loss": True}),
]


def our_sequences(case: Case, model: ModelSettings) -> list[TokenSequence]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = case.template or tokenizer.chat_template
    encoder = ChatEncoder(tokenizer, model, DataSettings(train=DataSource(path="x"), **case.data))
    return list(encoder.encode([Row(fields) for fields in case.rows]).sequences)


def trl_tokenizer(case: Case) -> PreTrainedTokenizerBase:
    """TRL finds what is trained by markers; we find it without them, or by them where a template has some."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = case.template or SMOLLM2
    return tokenizer


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradient_of_a_batch_are_those_of_trl(tmp_path, case):
    model = ModelSettings(path=str(tiny_model_dir(tmp_path / "model", "qwen3", scale=6.0)), compute_dtype="float32")
    policy = load_policy(model, LoraSettings(rank=4), 0, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (tmp_path / "adapter").mkdir()
    policy.save(tmp_path / "adapter", policy.trained_parameters())

    # TRL's: plain PEFT, transformers' own attention, a padded batch.
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(case.rows),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        disable_tqdm=True,
        max_length=None,
        **case.trl,
    )
    oracle = SFTTrainer(
        adapted, config, train_dataset=Dataset.from_list(list(case.rows)), processing_class=trl_tokenizer(case)
    )
    (padded,) = oracle.get_train_dataloader()
    expected_loss = oracle.compute_loss(oracle.model, dict(padded))
    expected_loss.backward()
    expected = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}

    # Ours: two packs.
    sequences = our_sequences(case, model)
    learner = Learner(policy, World(rank=0, size=1, device=CPU))
    for group in (sequences[:1], sequences[1:]):
        learner.forward_backward(Batch.pack(group, CPU), sft_loss)
    tokens = sum(sequence.num_trained for sequence in sequences)
    gradient = {name: master.grad / tokens for name, master in learner.masters.items() if master.grad is not None}
    loss = learner.optim_step(AdamParams.of(OptimizerSettings(max_grad_norm=None), 1e-3), tokens).metrics["loss"]

    assert trained_tokens_of(padded) == {sequence.token_ids: (False, *sequence.loss_mask[1:]) for sequence in sequences}
    assert len({len(sequence.token_ids) for sequence in sequences}) == len(sequences)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-4)
    assert gradient.keys() == expected.keys()
    for name, ours in gradient.items():
        assert ours.abs().max() > 1e-6, name
        assert (ours - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def trained_tokens_of(padded) -> dict[tuple[int, ...], tuple[bool, ...]]:
    """Of each padded row its tokens and which of them are trained; the first never is, whatever its label."""
    found = {}
    lengths = padded["attention_mask"].sum(-1)
    for ids, labels, length in zip(padded["input_ids"], padded["labels"], lengths, strict=True):
        assert (labels[length:] == IGNORED).all()
        flags = (labels[:length] != IGNORED).tolist()
        found[tuple(ids[:length].tolist())] = (False, *flags[1:])
    return found
