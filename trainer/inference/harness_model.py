"""A model as lm-eval asks it: logprobs of continuations, whole texts, and answers. Needs the package lm-eval."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trainer.data.tokens import TokenInputs, TokenSequence
from trainer.errors import UserError
from trainer.inference.chat_model import ChatModel, Draw
from trainer.model.batch import Batch
from trainer.sampling.sampler import SampleRequest, SamplingParams

PACK_TOKENS: Final = 2048
"""Tokens of one forward pass."""
POSITIONS: Final = 2048
"""Where the model does not say how many it has."""
ANSWER_TOKENS: Final = 256
CHUNK: Final = 16
"""Prompts that are answered together."""

Scored = tuple[float, bool]
"""Sum of the logprobs, and whether every token is the most likely one."""


@final
class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """A chat model behind lm-eval's interface."""

    def __init__(self, model: ChatModel) -> None:
        """Wrap a loaded model."""
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.max_length = int(model.policy.config.get("max_position_embeddings") or POSITIONS)

    @property
    def eot_token_id(self) -> int:
        """The token that separates texts, and stands before one without context."""
        token = self.tokenizer.eos_token_id
        return int(token[0] if isinstance(token, list) else token)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of rendered chats."""
        return str(self.model.source.model.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, by the model's template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The logprob of each whole text, in windows of the model's length."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(total for total, _ in self._scored(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, up to a stop string of the task or the model's stop token."""
        texts = []
        for settings, group in itertools.groupby(requests, lambda request: request.args[1]):
            contexts = [request.args[0] for request in group]
            for begin in range(0, len(contexts), CHUNK):
                texts += self._answered(contexts[begin : begin + CHUNK], settings)
        return texts

    def _answered(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = tuple([until] if isinstance(until, str) else until)
        params = self._params(settings, stops)
        room = self.max_length - params.max_completion_tokens
        prompts = [tuple(self.tok_encode(context)[-room:]) for context in contexts]
        asked = [SampleRequest(prompt, index, 1) for index, prompt in enumerate(prompts)]
        texts = [completion.text for (completion,) in self.model.sampler.sample(asked, params)]
        return [_before(text, stops) for text in texts]

    def _params(self, settings: Mapping[str, Any], stops: tuple[str, ...]) -> SamplingParams:
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        draw = Draw(
            int(settings.get("max_gen_toks") or ANSWER_TOKENS), temperature, float(settings.get("top_p") or 1.0)
        )
        params = draw.params(self.model.encoder.stop_ids)
        return SamplingParams(**{**params.__dict__, "stop": stops})

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """The continuation of each pair, given its context; pairs are packed."""
        sequences = [self._sequence(context, continuation) for context, continuation in pairs]
        scored: list[Scored] = []
        limit = self.model.policy.pack_limit(PACK_TOKENS)
        pack: list[TokenSequence] = []
        for sequence in sequences:
            if pack and sum(len(each.token_ids) for each in [*pack, sequence]) > limit:
                scored += self._of_pack(pack)
                pack = []
            pack.append(sequence)
        return scored + (self._of_pack(pack) if pack else [])

    def _sequence(self, context: list[int], continuation: list[int]) -> TokenSequence:
        if not continuation:
            raise UserError("a task asks for the logprob of an empty text; see its doc_to_target")
        tokens = (*context, *continuation)[-self.max_length :]
        num_own = min(len(continuation), len(tokens) - 1)
        mask = (False,) * (len(tokens) - num_own) + (True,) * num_own
        return TokenSequence(tokens, mask, TokenInputs(weights=(1.0,) * num_own))

    def _of_pack(self, pack: Sequence[TokenSequence]) -> list[Scored]:
        policy = self.model.policy
        policy.eval()
        batch = Batch.pack(list(pack), self.model.device)
        logprobs, are_best = policy.score_targets(batch)
        sizes = [sequence.num_trained for sequence in pack]
        pairs = zip(logprobs.double().split(sizes), are_best.split(sizes), strict=True)
        return [(float(each.sum()), bool(is_best.all())) for each, is_best in pairs]


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string.

    >>> _before("4. Next: 5", [". ", ":"])
    '4'
    """
    for stop in stops:
        text = text.partition(stop)[0]
    return text
