"""A model that answers chats: policy, tokenizer and sampler of one source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from trainer.config.recipe import ModelSettings
from trainer.data.chat import ChatEncoder, load_tokenizer
from trainer.data.forms import read_conversation
from trainer.errors import DataError, ModelError
from trainer.inference.source import ModelSource
from trainer.inference.text_stream import TextStream
from trainer.model.adapters import RUN_ADAPTER
from trainer.model.base_model import load_base
from trainer.model.policy import Policy, load_policy
from trainer.model.rms_norm import use_fused_norms
from trainer.sampling.local import LocalSampler, OnTokens
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.training.masters import read_masters
from trainer.types import Completion, Row

UNBOUNDED: Final = 1 << 20
"""Tokens of a prompt where the model does not say how many it takes."""


@final
@dataclass(frozen=True)
class Draw:
    """How answers are drawn."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1

    def params(self, stop_ids: frozenset[int]) -> SamplingParams:
        """The sampler's parameters."""
        is_greedy = self.temperature == 0.0
        return SamplingParams(
            max_completion_tokens=self.max_tokens,
            stop_ids=stop_ids,
            seed=self.seed,
            step=0,
            temperature=1.0 if is_greedy else self.temperature,
            top_p=self.top_p,
            is_greedy=is_greedy,
        )


@final
class ChatModel:
    """A loaded model."""

    def __init__(self, source: ModelSource) -> None:
        """Load it, on a GPU where there is one.

        Raises:
            ModelError: it cannot be loaded, has no chat template, or was trained on text without one.
        """
        if source.data.format != "chat":
            raise ModelError(f"{source.label}: was trained with data.format {source.data.format}, not on chats")
        self.source = source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(source.model)
        data = source.data.model_copy(update={"max_seq_tokens": UNBOUNDED})
        self.encoder = ChatEncoder(self.tokenizer, source.model, data, for_prompts=True)
        self.policy = _load_policy(source, self.device)
        self.sampler = LocalSampler(self.policy, self.tokenizer)
        self.sampler.publish(self.policy, 0)

    def prompt_ids(self, row: Row) -> tuple[int, ...]:
        """The tokens of a prompt, up to where the model goes on.

        Raises:
            DataError: the row is no prompt.
        """
        return self.encoder.encode_prompt(row)

    def answer(self, rows: Sequence[Row], draw: Draw, on_tokens: OnTokens | None = None) -> list[list[Completion]]:
        """Answer prompts together; `num_samples` completions for each, in their order.

        Args:
            rows: prompts; the index of each selects its noise.
            draw: how.
            on_tokens: called at each token; see `LocalSampler.sample`.

        Raises:
            DataError: a row is no prompt.
        """
        return self.sample(rows, draw.params(self.encoder.stop_ids), draw.num_samples, on_tokens)

    def sample(
        self, rows: Sequence[Row], params: SamplingParams, num_samples: int, on_tokens: OnTokens | None = None
    ) -> list[list[Completion]]:
        """Like `answer`, with the sampler's own parameters.

        Args:
            rows: prompts.
            params: how tokens are drawn.
            num_samples: completions per prompt.
            on_tokens: called at each token; see `LocalSampler.sample`.
        """
        requests = [SampleRequest(self.prompt_ids(row), row.index, num_samples) for row in rows]
        return self.sampler.sample(requests, params, on_tokens)

    def reply(
        self, messages: Sequence[Mapping[str, Any]], draw: Draw, on_text: Callable[[str], None] | None = None
    ) -> Completion:
        """Answer one chat.

        Args:
            messages: ends with a user turn.
            draw: how; the first sample is returned.
            on_text: called with each new piece of the answer's text; the pieces together are the text.
        """
        stream = TextStream(self.tokenizer, on_text) if on_text is not None else None
        row = Row({"messages": list(messages)}, file="chat", line=1)
        ((completion, *_),) = self.answer([row], draw, stream.take if stream is not None else None)
        if stream is not None:
            stream.finish(completion.text)
        return completion


def _load_policy(source: ModelSource, device: torch.device) -> Policy:
    """The policy with the trained weights."""
    if source.checkpoint is not None:
        return _of_checkpoint(source, source.checkpoint, device)
    if source.lora is None or source.adapter is None:
        base = load_base(source.model, device)
        use_fused_norms(base)
        return Policy(base, None, source.model.path)  # nothing is trained, so mixtures of experts are fine too
    policy = load_policy(_untrained(source.model), source.lora, 0, device)
    assert policy.adapters is not None, "it was loaded with one"
    saved = policy.adapters.load_tensors(RUN_ADAPTER, source.adapter)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            parameter.copy_(saved[name])
    return policy


def _untrained(model: ModelSettings) -> ModelSettings:
    """The settings without those of a backward pass, which the device here may not support."""
    return model.model_copy(update={"gradient_checkpointing": False, "activation_offload": False})


def _of_checkpoint(source: ModelSource, checkpoint: Path, device: torch.device) -> Policy:
    """The policy with the masters of a checkpoint, rounded to the dtype in which it computes."""
    policy = load_policy(_untrained(source.model), source.lora, 0, device)
    parameters = policy.trained_parameters()
    masters = {name: torch.empty(value.shape, dtype=torch.float32) for name, value in parameters.items()}
    read_masters(checkpoint, masters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(masters[name])
    return policy


def prompt_row(row: Row, source: ModelSource) -> Row:
    """The row as a prompt: a chat that ends with an answer loses it; the answer becomes the field `completion`.

    Args:
        row: in any form that is read.
        source: says how its rows are read.

    Raises:
        DataError: the row has no form that is read.
    """
    data = source.data
    try:
        read_conversation(row, data, with_completion=False)
    except DataError as error:
        try:
            chat = read_conversation(row, data, with_completion=True)
        except DataError:
            raise error from None
        kept = {name: value for name, value in row.items() if name not in chat.uses or name in PROMPT_FIELDS}
        *prompt, gold = chat.messages
        return Row({**kept, "messages": prompt, "completion": gold["content"]}, row.file, row.line, row.index)
    return row


PROMPT_FIELDS: Final = frozenset({"tools", "chat_template_kwargs"})
"""Parts of a prompt beside its messages."""
