"""In-process sampling with a KV cache; each prompt is prefilled once, finished completions leave the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from transformers import PreTrainedTokenizerBase

from trainer.errors import NumericalError
from trainer.model.lm_head import LogitTransform
from trainer.model.policy import Policy
from trainer.model.turn_cache import TurnCache
from trainer.sampling import noise
from trainer.sampling.choose_decoder import choose_decoder
from trainer.sampling.sampler import SampleRequest, SamplingParams, decoded
from trainer.types import Completion, FinishReason

TAIL_MARGIN: Final = 8
"""Extra tokens decoded before those that a stop string can span: some tokenizers decode the first token differently."""

OnTokens = Callable[[int, Sequence[int]], None]
"""Takes the index of a completion and its tokens so far."""
CPU_TILE_CELLS: Final = 1 << 18
"""Logits sampled from at once on a CPU: few enough for its cache, four times faster than 32 rows of 49,152."""


@final
class LocalSampler:
    """Samples from a policy in this process."""

    draws_apart: Final = False

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, *, may_copy: bool = True) -> None:
        """Prepare the decoder; `publish` loads the weights.

        Args:
            policy: samples are drawn from it.
            tokenizer: decodes them.
            may_copy: whether there is memory for a copy of the linear layers, which fast decoders make.

        Raises:
            ModelError: the policy's weights are sharded.
        """
        chosen = choose_decoder(policy, may_copy=may_copy)
        self.tokenizer = tokenizer
        self.form = policy.logit_transform
        self.decoder, self.note = chosen.decoder, chosen.note
        self.device = policy.device
        self.policy, self.version = policy, -1

    @torch.no_grad()
    def publish(self, policy: Policy, version: int) -> None:
        """Take the policy's current weights; completions carry `version` from now on."""
        assert policy is self.policy, "a local sampler samples from one policy only"
        self.decoder.refresh()
        self.version = version

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, on_tokens: OnTokens | None = None
    ) -> list[list[Completion]]:
        """Draw `num_samples` completions per request; one list per request, in the same order.

        Args:
            requests: the prompts.
            params: how tokens are drawn.
            on_tokens: called after each token with the index of its completion, over all requests, and its tokens.

        Raises:
            NumericalError: the model's logits are not finite.
        """
        assert self.version >= 0, "publish before sampling"
        assert all(request.num_samples == 1 for request in requests if request.cache is not None)
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        caches = _caches(requests, self.version)
        if caches is not None:  # a later turn: every conversation has a prompt of its own
            prompts = [request.prompt_ids for request in requests]
        prompt_index = {prompt: index for index, prompt in enumerate(prompts)}
        drafts = [
            _Draft(
                number if caches is not None else prompt_index[request.prompt_ids],
                request.row,
                request.first_sample + sample,
                request.turn,
                request.cache,
            )
            for number, request in enumerate(requests)
            for sample in range(request.num_samples)
        ]
        for index, draft in enumerate(drafts):
            draft.index = index
        if drafts:
            self._draw_all(prompts, drafts, caches, params, on_tokens)
        completions = iter([self._completion(draft) for draft in drafts])
        return [[next(completions) for _ in range(request.num_samples)] for request in requests]

    def _completion(self, draft: _Draft) -> Completion:
        text = decoded(self.tokenizer, draft.token_ids)
        return Completion(tuple(draft.token_ids), tuple(draft.logprobs), draft.finish_reason, self.version, text)

    def _draw_all(
        self,
        prompts: Sequence[tuple[int, ...]],
        drafts: Sequence[_Draft],
        caches: Sequence[TurnCache] | None,
        params: SamplingParams,
        on_tokens: OnTokens | None,
    ) -> None:
        rows = self.decoder.start(prompts, [draft.prompt for draft in drafts], caches)
        hidden = rows.begin()
        keys = noise.row_keys(
            params.seed, params.step, [draft.row for draft in drafts], [draft.sample for draft in drafts], self.device
        )
        keys = noise.turn_keys(keys, [draft.turn for draft in drafts])
        live, stop_rule = list(drafts), _StopRule(params, self.tokenizer)
        for position in range(params.max_completion_tokens):
            tokens, logprobs = self._draw_next(hidden, params, keys, position)
            finished = []
            for index, (draft, token, logprob) in enumerate(zip(live, tokens.tolist(), logprobs.tolist(), strict=True)):
                draft.token_ids.append(token)
                draft.logprobs.append(logprob)
                if stop_rule.ends(draft):
                    draft.finish_reason = "stop"
                    finished.append(index)
            if on_tokens is not None:
                for draft in live:
                    on_tokens(draft.index, draft.token_ids)
            is_over = len(finished) == len(live) or position + 1 == params.max_completion_tokens
            for index in range(len(live)) if is_over else finished:
                draft = live[index]
                if draft.cache is not None:
                    rows.keep_turn(index, (*prompts[draft.prompt], *draft.token_ids), draft.cache)
            if is_over:
                break
            if finished:
                remaining = rows.drop(finished)
                live = [live[index] for index in remaining.tolist()]
                tokens, keys = tokens[remaining], keys[remaining]
            hidden = rows.append(tokens)
        if not all(math.isfinite(logprob) for draft in drafts for logprob in draft.logprobs):
            raise NumericalError("the logits of the policy are not finite; its weights are broken")

    def _draw_next(
        self, hidden: torch.Tensor, params: SamplingParams, keys: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] next tokens and their [R] logprobs, from [R, H] last hidden states."""
        logits = self.decoder.head(hidden)
        num_rows = max(1, CPU_TILE_CELLS // logits.shape[1]) if self.device.type == "cpu" else len(logits)
        tiles = zip(logits.split(num_rows), noise.uniforms(keys, position).split(num_rows), strict=True)
        drawn = [_draw(tile, self.form, params, uniform) for tile, uniform in tiles]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])


def _caches(requests: Sequence[SampleRequest], version: int) -> list[TurnCache] | None:
    """The caches of all requests where one has cached something of this version; None where none has."""
    caches = [request.cache for request in requests if request.cache is not None]
    for cache in caches:
        if cache.version != version:
            cache.clear()
            cache.version = version
    if not any(cache.token_ids for cache in caches):
        return None
    assert len(caches) == len(requests)
    return caches


@final
@dataclass
class _Draft:
    """A completion in progress."""

    prompt: int
    """Index of its prompt among the distinct prompts."""
    row: int
    sample: int
    turn: int = 0
    cache: TurnCache | None = None
    index: int = 0
    """Over all requests."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


@final
class _StopRule:
    """Ends a completion at a stop token, or at the token that completes a stop string."""

    def __init__(self, params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> None:
        self.params, self.tokenizer = params, tokenizer
        self.tail = TAIL_MARGIN + max((len(text.encode()) for text in params.stop), default=0)

    def ends(self, draft: _Draft) -> bool:
        """Whether the newest token is the last."""
        if draft.token_ids[-1] in self.params.stop_ids:
            return True
        if not self.params.stop:
            return False
        text = self.tokenizer.decode(draft.token_ids[-self.tail :], skip_special_tokens=False)
        return any(stop in text for stop in self.params.stop)


def _draw(
    logits: torch.Tensor, form: LogitTransform, params: SamplingParams, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] tokens and their [R] untruncated logprobs at the sampling temperature, from the head's [R, V] raw outputs."""
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
