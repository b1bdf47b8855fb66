"""A model's own forward pass: one sequence, its own attention, no packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from trainer.model.attention import PACKED_ATTENTION

UNFIT: Final = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What a model's code raises where its signature or body does not fit the call."""


def own_logprobs(model: torch.nn.Module, token_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """[T - 1] float32 logprobs of every token but the first, of one sequence, with the model's own attention and head.

    Args:
        model: of transformers or PEFT, with an LM head.
        token_ids: the sequence.
        device: of the model.
    """
    ids = torch.tensor(token_ids, device=device)
    reset_rotary(model)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def use_own_attention(model: PreTrainedModel) -> None:
    """Set the attention that transformers would choose: SDPA where the model supports it, otherwise eager."""
    try:
        set_attention(model, "sdpa")
    except ValueError:
        set_attention(model, "eager")


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the implementation of a model's attention.

    Args:
        model: the model. If its code does not choose attention by name, the name decides about masks only: it has eager
            attention, or the one that it was loaded with.
        name: `eager`, `sdpa`, or a registered name.
    """
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    elif model.config._attn_implementation == PACKED_ATTENTION:
        model.config._attn_implementation = "eager"


@contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use an attention implementation within the block.

    Args:
        model: the model.
        name: of the implementation, as for `set_attention`.
    """
    before = model.config._attn_implementation
    set_attention(model, name)
    try:
        yield
    finally:
        model.config._attn_implementation = before


def reset_rotary(model: torch.nn.Module) -> None:
    """Forget the lengths seen so far where rotary factors grow with them (dynamic NTK).

    Otherwise the factors of a sequence of 100 tokens would be those of the longest one before it.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
