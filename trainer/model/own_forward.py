"""A model's own forward pass: one sequence, its own attention, no packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from transformers import Cache, PreTrainedModel

from trainer.errors import ModelError
from trainer.model.attention import PACKED_ATTENTION

TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Limit of the mean difference of logprobs between two ways to compute them, 1e-3 in other types; rounding is far below
it."""
CACHES: Final = ("past_key_values", "cache_params")
"""Names under which models return their cache, and take it."""
UNFIT: Final = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What a model's code raises where its signature or body does not fit the call."""


def cannot_run_alone(model: torch.nn.Module, error: Exception) -> ModelError:
    """The refusal of a model whose code takes no sequence of tokens alone.

    Args:
        model: the model.
        error: one of `UNFIT`, from its forward pass.
    """
    return ModelError(f"{type(model).__name__} cannot run a sequence of tokens alone ({type(error).__name__}: {error})")


@final
class OwnForward:
    """The backbone of a model with the cache that its own code keeps, or without any."""

    def __init__(self, causal_lm: PreTrainedModel, *, is_cached: bool) -> None:
        """Compute with a model.

        Args:
            causal_lm: the model.
            is_cached: keep its cache between calls; otherwise every call is a pass over whole sequences.
        """
        self._causal_lm: Any = causal_lm
        self.is_cached, self._cache_name = is_cached, ""

    def __call__(self, token_ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache | None]:
        """[n, L, H] hidden states of the tokens, and the cache of all tokens.

        Args:
            token_ids: [n, L]: whole sequences, or what follows the tokens of a cache.
            cache: of the tokens before; None: there are none.

        Raises:
            ValueError: the model does not return a cache whose rows can be chosen.
        """
        if not self.is_cached:
            reset_rotary(self._causal_lm)
            return self._causal_lm.base_model(input_ids=token_ids, use_cache=False).last_hidden_state, None
        given = {} if cache is None else {self._cache_name: cache}
        output = self._causal_lm.base_model(input_ids=token_ids, use_cache=True, **given)
        self._cache_name = next((name for name in CACHES if isinstance(output.get(name), Cache)), "")
        if not self._cache_name:
            raise ValueError(f"{type(self._causal_lm).__name__} returns no cache of transformers")
        return output.last_hidden_state, output[self._cache_name]


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
