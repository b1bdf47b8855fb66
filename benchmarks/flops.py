"""Model FLOPs of training and sampling; recomputation is not counted.

A linear layer of N weights takes 2 N FLOPs per token forward and 2 N for the gradient of its input; full-parameter
training takes another 2 N for the gradient of its weights. Causal attention to a sequence of L tokens has two products
of L x L / 2 pairs forward and four backward. The head is computed for scored tokens only. Not counted: embeddings,
norms and adapters (below 1%).
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.planning.model_facts import ModelFacts


def forward_flops(facts: ModelFacts, lengths: Sequence[int], num_scored: int) -> float:
    """FLOPs of scoring sequences.

    Args:
        facts: of the model.
        lengths: tokens of each sequence.
        num_scored: tokens that the head works on.
    """
    return _linear(facts, sum(lengths), num_scored) + _attention(facts, lengths)


def training_flops(facts: ModelFacts, lengths: Sequence[int], num_scored: int, *, is_lora: bool) -> float:
    """FLOPs of a forward and a backward pass; arguments as above."""
    factor = 2 if is_lora else 3
    return factor * _linear(facts, sum(lengths), num_scored) + 3 * _attention(facts, lengths)


def sampling_flops(facts: ModelFacts, prompts: Sequence[int], num_samples: int, num_drawn: int) -> float:
    """FLOPs of drawing `num_drawn` tokens `num_samples` times after each prompt, whose keys are computed once."""
    flops = forward_flops(facts, prompts, len(prompts))
    for prompt in prompts:
        seen = num_drawn * prompt + num_drawn * num_drawn / 2
        pairs = 4.0 * facts.layers * facts.query_width * seen
        flops += num_samples * (_linear(facts, num_drawn, num_drawn) + pairs)
    return flops


def _linear(facts: ModelFacts, num_tokens: int, num_scored: int) -> float:
    return 2.0 * (facts.active_block_params * num_tokens + facts.vocab * facts.hidden * num_scored)


def _attention(facts: ModelFacts, lengths: Sequence[int]) -> float:
    return 2.0 * facts.layers * facts.query_width * sum(length * length for length in lengths)
