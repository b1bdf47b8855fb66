"""Bodies of OpenAI's API as typed data, and the sampling that they ask for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from trainer.engine.protocol import Sampling
from trainer.serve.api_errors import ApiError

MAX_N: Final = 128
MAX_TOP_LOGPROBS: Final = 20
MAX_DIGITS: Final = 9
"""Of a token id that is written as text."""
Probability = Annotated[float, Field(ge=0, le=1)]


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; nothing is padded."""


class _Request(BaseModel):
    """What chats and plain completions share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted, not used; the same holds for the fields below."""
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_choices(self) -> int:
        """`n`."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(
        self, max_tokens: int, stop_ids: tuple[int, ...], vocab: int, logprobs: int | None, grammar: str | None = None
    ) -> Sampling:
        """The engine's parameters of the first sequence.

        Args:
            max_tokens: of the completion.
            stop_ids: of the model.
            vocab: of the model.
            logprobs: alternatives to report; None reports nothing.
            grammar: that the text follows.

        Raises:
            ApiError: a token of logit_bias or stop_token_ids does not exist.
        """
        bias = []
        for key, value in (self.logit_bias or {}).items():
            if not key.isdecimal() or len(key) > MAX_DIGITS or int(key) >= vocab:
                raise ApiError(400, f"{key!r:.40} is no token id; the vocabulary has {vocab:,}", param="logit_bias")
            bias.append((int(key), value))
        for token in self.stop_token_ids or ():
            if not 0 <= token < vocab:
                raise ApiError(400, f"{token} is no token id; the vocabulary has {vocab:,}", param="stop_token_ids")
        return Sampling(
            max_tokens=max_tokens,
            seed=self.seed if self.seed is not None else secrets.randbits(62),
            stop_ids=() if self.ignore_eos else (*stop_ids, *(self.stop_token_ids or ())),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple(bias),
            logprobs=logprobs,
            grammar=grammar,
        )


class JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None reports nothing.

        Raises:
            ApiError: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the completion, as asked."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """As vLLM has it, like the fields below: log-probabilities of the prompt's tokens."""
    return_token_ids: bool = False
    """Adds `prompt_token_ids`, `token_ids` and `stop_reason` to each choice; rollouts need them."""
    return_tokens_as_token_ids: bool = False
    """Names the tokens of `logprobs` by their ids, for example `token_id:42`."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text, and of what stop strings are looked for in."""

    def sampling(
        self, max_tokens: int, stop_ids: tuple[int, ...], vocab: int, logprobs: int | None, grammar: str | None = None
    ) -> Sampling:
        """The engine's parameters of the first sequence; see `_Request`."""
        plain = super().sampling(max_tokens, stop_ids, vocab, logprobs, grammar)
        return replace(plain, prompt_logprobs=self.prompt_logprobs)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [each for each in self.prompt if isinstance(each, int)]
        return [ids] if ids else [each for each in self.prompt if not isinstance(each, int)]


def validation_error(errors: list[Mapping[str, Any]]) -> ApiError:
    """All mistakes of a body, in one message."""
    texts, params = [], []
    for error in errors:
        if error["type"] == "json_invalid":  # its place is a character
            texts.append(f"the body is no JSON: {error.get('ctx', {}).get('error', error['msg'])}")
            continue
        parts = [str(part) for part in error["loc"] if part != "body"]
        message = "unknown field, not supported" if error["type"] == "extra_forbidden" else error["msg"]
        texts.append(f"{'.'.join(parts)}: {message}" if parts else message)
        params += parts[:1]
    return ApiError(400, "; ".join(texts), param=params[0] if params else None)
