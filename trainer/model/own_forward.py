"""Logprobs by a model's own forward pass, to compare ours with."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def own_logprobs(model: torch.nn.Module, token_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """[T - 1] float32 logprobs of every token but the first, of one sequence, with the model's own attention and head.

    Args:
        model: of transformers or PEFT, with an LM head.
        token_ids: the sequence.
        device: of the model.
    """
    ids = torch.tensor(token_ids, device=device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
