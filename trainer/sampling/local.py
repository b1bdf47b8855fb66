"""Sampling in process with the policy's weights: cached, prompts read once, finished rows leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from trainer.errors import ModelError, NumericalError
from trainer.model.kv_cache import KeyValueCache
from trainer.model.layout import CachedLayout, PackedLayout
from trainer.model.lm_head import HeadForm
from trainer.model.policy import Policy
from trainer.sampling import noise
from trainer.sampling.decoder import CopiedDecoder, Decoder
from trainer.sampling.fused import FusedDecoder, is_fusible
from trainer.sampling.sampler import SampleRequest, SamplingParams
from trainer.types import Completion, FinishReason

TAIL_MARGIN: Final = 8
"""Tokens decoded before those that a stop string can span, since some tokenizers decode the first one differently."""

CPU_TILE_CELLS: Final = 1 << 18
"""Logits that are drawn from at once on a CPU: they stay in its cache, four times faster than 32 rows of 49,152."""


@final
class LocalSampler:
    """Draws with the weights of a policy in this process."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare to decode; weights are taken by `publish`.

        Raises:
            ModelError: the policy's weights are sharded.
        """
        self.tokenizer = tokenizer
        self.form = policy.form
        self.decoder = _decoder_of(policy)
        self.device = next(policy.causal_lm.parameters()).device
        self.policy, self.version = policy, -1

    @torch.no_grad()
    def publish(self, policy: Policy, version: int) -> None:
        """Take the policy's weights; completions carry `version` from now on."""
        assert policy is self.policy, "a local sampler belongs to one policy"
        self.decoder.refresh()
        self.version = version

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Draw `num_samples` completions of each request; lists stand in the order of the requests.

        Raises:
            NumericalError: the model's logits are not finite.
        """
        assert self.version >= 0, "publish before sampling"
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        number = {prompt: index for index, prompt in enumerate(prompts)}
        drafts = [
            _Draft(owner=number[request.prompt_ids], row=request.row, sample=request.first_sample + sample)
            for request in requests
            for sample in range(request.num_samples)
        ]
        if drafts:
            self._draw_all(prompts, drafts, params)
        completions = iter([draft.completion(self.version) for draft in drafts])
        return [[next(completions) for _ in range(request.num_samples)] for request in requests]

    def _draw_all(self, prompts: Sequence[tuple[int, ...]], drafts: Sequence[_Draft], params: SamplingParams) -> None:
        lengths = [len(prompt) for prompt in prompts]
        cache = KeyValueCache(lengths, self.device)
        owners = [draft.owner for draft in drafts]
        hidden = self._read_prompts(prompts, cache)[torch.tensor(owners, device=self.device)]
        cache.branch(owners)
        starts = torch.tensor(lengths, device=self.device)[torch.tensor(owners, device=self.device)]
        keys = noise.row_keys(
            params.seed, params.step, [draft.row for draft in drafts], [draft.sample for draft in drafts], self.device
        )
        live, ends = list(drafts), _Ends(params, self.tokenizer)
        for position in range(params.max_completion_tokens):
            tokens, logprobs = self._draw_next(hidden, params, keys, position)
            finished = []
            for place, (draft, token, logprob) in enumerate(zip(live, tokens.tolist(), logprobs.tolist(), strict=True)):
                draft.token_ids.append(token)
                draft.logprobs.append(logprob)
                if ends.reached_by(draft):
                    finished.append(place)
            if len(finished) == len(live) or position + 1 == params.max_completion_tokens:
                break
            if finished:
                left = cache.drop(finished)
                live = [live[place] for place in left.tolist()]
                tokens, starts, keys = tokens[left], starts[left], keys[left]
            hidden = self.decoder.hidden(tokens, starts + position, CachedLayout(cache, None))
            cache.advance()
        if not all(math.isfinite(logprob) for draft in drafts for logprob in draft.logprobs):
            raise NumericalError("sampling met logits that are not finite; the weights of the policy are broken")

    def _draw_next(
        self, hidden: torch.Tensor, params: SamplingParams, keys: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] tokens and [R] their logprobs, from [R, H] last hidden states."""
        logits = self.decoder.head(hidden)
        num_rows = max(1, CPU_TILE_CELLS // logits.shape[1]) if self.device.type == "cpu" else len(logits)
        tiles = zip(logits.split(num_rows), noise.uniforms(keys, position).split(num_rows), strict=True)
        drawn = [_draw(tile, self.form, params, uniform) for tile, uniform in tiles]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]], cache: KeyValueCache) -> torch.Tensor:
        """[S, H] hidden state of each prompt's last token."""
        lengths = [len(prompt) for prompt in prompts]
        token_ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        layout = CachedLayout(cache, PackedLayout.of_lengths(lengths, self.device))
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.decoder.hidden(token_ids, positions, layout)[last]


@final
@dataclass
class _Draft:
    """A completion while it is drawn."""

    owner: int
    """Number of its prompt."""
    row: int
    sample: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def completion(self, version: int) -> Completion:
        return Completion(tuple(self.token_ids), tuple(self.logprobs), self.finish_reason, version)


@final
class _Ends:
    """Where a completion ends: at a stop token, or with the token that completes a stop string."""

    def __init__(self, params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> None:
        self.params, self.tokenizer = params, tokenizer
        self.tail = TAIL_MARGIN + max((len(text.encode()) for text in params.stop), default=0)

    def reached_by(self, draft: _Draft) -> bool:
        """Whether the newest token is the last; says so in the draft."""
        is_end = draft.token_ids[-1] in self.params.stop_ids
        if not is_end and self.params.stop:
            text = self.tokenizer.decode(draft.token_ids[-self.tail :], skip_special_tokens=False)
            is_end = any(stop in text for stop in self.params.stop)
        if is_end:
            draft.finish_reason = "stop"
        return is_end


def _decoder_of(policy: Policy) -> Decoder:
    if any(isinstance(parameter, DTensor) for parameter in policy.causal_lm.parameters()):
        raise ModelError("a sharded model cannot be sampled in process; set rollout.sampler to vllm")
    return FusedDecoder(policy) if is_fusible(policy) else CopiedDecoder(policy)


def _draw(
    logits: torch.Tensor, form: HeadForm, params: SamplingParams, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] tokens and [R] their untruncated logprobs at the sampling temperature, from [R, V] products of the head."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if form.scale != 1.0:
        logits = logits * form.scale
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    if params.temperature != 1.0:
        logits = logits / params.temperature
    probabilities = logits.softmax(-1)
    if params.is_greedy:
        tokens = probabilities.argmax(-1)
    else:
        quanta = noise.quantize(probabilities)
        quanta = noise.truncate(quanta, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
        tokens = noise.draw(quanta, uniform).clamp(max=logits.shape[1] - 1)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()
