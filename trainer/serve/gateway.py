"""The gateway's state: models, engine, limits, counters; and what requests become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, final

from prometheus_client import CollectorRegistry, Counter, Histogram

from trainer.errors import TrainerError, UserError
from trainer.inference.source import ModelSource, find_source
from trainer.run.step_names import step_number
from trainer.serve.api_errors import ApiError
from trainer.serve.choices import Job, samples
from trainer.serve.engine import Engine
from trainer.serve.metrics import RequestMetrics
from trainer.serve.models import Served, ServedModels
from trainer.serve.reasoning import reasoning_of, template_arguments
from trainer.serve.requests import ChatRequest, CompletionRequest
from trainer.serve.structure import CALL_TAGS, lark, schema_of, schema_rules
from trainer.serve.text import special_ids
from trainer.serve.tools import tool_rules, tools_of

if TYPE_CHECKING:
    from trainer.serve.traces import Traces

DEFAULT_COMPLETION: Final = 16
"""`max_tokens` of /v1/completions where the request has none, as OpenAI defines it."""


@final
@dataclass(frozen=True)
class Limits:
    """What protects the server."""

    max_queue: int = 256
    """Sequences in flight; further requests get 429."""
    api_key_digests: frozenset[bytes] = frozenset()
    """SHA-256 of the keys; empty: no key is needed."""


@final
class Metrics:
    """Counters for Prometheus."""

    def __init__(self) -> None:
        """Register them in a registry of this gateway's own."""
        self.registry = CollectorRegistry()
        self.requests = Counter("trainer_requests", "Requests", ["route", "status"], registry=self.registry)
        self.tokens = Counter("trainer_tokens", "Tokens", ["kind", "model"], registry=self.registry)
        self.first_token_s = Histogram("trainer_first_token_seconds", "To the first token", registry=self.registry)
        self.by_model = RequestMetrics(self.registry)


@final
class Gateway:
    """Turns requests into sequences of the engine."""

    def __init__(
        self,
        models: ServedModels,
        engine: Engine,
        limits: Limits,
        metrics: Metrics | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Begin with the adapters that `models` has.

        Args:
            models: what requests may name.
            engine: continues sequences.
            limits: of this server.
            metrics: counters that it shares with other gateways; its own when left out.
            traces: makes spans of sequences; None makes none.
        """
        self.models, self.limits, self.metrics = models, limits, metrics or Metrics()
        self.engine, self.traces = engine if traces is None else traces.of(engine), traces
        self.is_draining = False
        self._num_admitted = 0

    @contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Count sequences as in flight within the block.

        Raises:
            ApiError: 429 with a time to wait, or 503 while the server ends.
        """
        if self.is_draining:
            raise ApiError(503, "the server is ending", retry_s=5)
        in_flight, most = max(self._num_admitted, self.engine.num_live), self.limits.max_queue
        if in_flight + count > most:
            raise ApiError(429, f"{in_flight} sequences are in flight, the most is {most}", retry_s=1)
        self._num_admitted += count
        try:
            yield
        finally:
            self._num_admitted -= count

    def chat_jobs(self, request: ChatRequest) -> list[Job]:
        """The sequences of a chat request.

        Raises:
            ApiError: the request cannot be answered, with the reason.
        """
        served = self.models.find(request.model)
        schema, tools = schema_of(request), tools_of(request, served)
        prompt = served.prompt_ids(request.messages, request.tools, template_arguments(request, served))
        reasoning = reasoning_of(served, prompt)
        grammar, added = None, served.tokenizer.get_added_vocab()
        if tools:
            grammar = lark(tool_rules(request, tools, added), added, reasoning)
        elif schema is not None:
            grammar = lark(schema_rules(schema), added, reasoning)
        tags = (*(CALL_TAGS if tools else ()), *(() if reasoning is None else reasoning.form.tags))
        shown = special_ids(served.tokenizer, tags) if tags else frozenset()
        limit = self._limit(request.limit, prompt)
        vocab = int(self.engine.hello["vocab"])
        sampling = request.sampling(limit, served.stop_ids, vocab, request.num_logprobs, grammar)
        return samples(Job(prompt, sampling, served, request.stops, reasoning, shown), request.num_choices)

    def completion_jobs(self, request: CompletionRequest) -> list[Job]:
        """The sequences of a plain completion: `n` for each prompt.

        Raises:
            ApiError: the request cannot be answered, with the reason.
        """
        served = self.models.find(request.model)
        if request.suffix:
            raise ApiError(400, "suffix is not supported", param="suffix")
        if request.echo and request.stream:
            raise ApiError(400, "echo is not supported in a stream", param="echo")
        if request.best_of not in (None, request.num_choices):
            raise ApiError(400, "best_of is supported only where it equals n", param="best_of")
        vocab = int(self.engine.hello["vocab"])
        jobs: list[Job] = []
        prompts = _prompts(request.prompts, served, vocab)
        if len(prompts) * request.num_choices > self.limits.max_queue:
            most = f"the most is {self.limits.max_queue}"
            raise ApiError(400, f"{len(prompts):,} prompts times n are too many sequences; {most}", param="prompt")
        for prompt in prompts:
            limit = self._limit(DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens, prompt)
            sampling = request.sampling(limit, served.stop_ids, vocab, request.logprobs)
            if request.echo:
                sampling = replace(sampling, prompt_logprobs=request.logprobs)
            job = Job(prompt, sampling, served, request.stops, skip_special_tokens=request.skip_special_tokens)
            jobs += samples(job, request.num_choices)
        return jobs

    def _limit(self, asked: int | None, prompt: Sequence[int]) -> int:
        """Tokens of the completion: what was asked, or all that fit behind the prompt."""
        window = int(self.engine.hello["window"])
        room = window - len(prompt)
        if room < 1 or (asked or 0) > room:
            raise ApiError(
                400,
                f"the prompt has {len(prompt):,} tokens and the completion may have {asked or 1:,}; together at most "
                f"{window:,} fit. Shorten the messages or lower max_tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        return room if asked is None else asked

    async def load_adapter(self, name: str, target: str) -> str:
        """Serve a run or an adapter directory under a name; the same name again replaces it. Returns its version.

        Raises:
            ApiError: it cannot be served, with the reason; what was served before stays.
        """
        try:
            served = self.models.add(name, served_source(target))
        except TrainerError as error:
            raise ApiError(400, str(error)) from None
        reply = await self.engine.ask("load", name=name, path=served.path)
        if not reply["ok"]:
            raise ApiError(400, str(reply["error"]))
        self.models.put(replace(served, version=str(reply["version"])))
        return str(reply["version"])

    async def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter; requests in flight end with it.

        Raises:
            ApiError: there is none of this name.
        """
        if name not in self.models.adapters:
            raise ApiError(404, f"no adapter {name!r} is loaded")
        del self.models.adapters[name]
        await self.engine.ask("unload", name=name)


def _prompts(prompts: Sequence[str | list[int]], served: Served, vocab: int) -> list[tuple[int, ...]]:
    """Token ids of each prompt; texts are tokenized with the special tokens that the tokenizer adds."""
    try:
        found = [tuple(served.tokenizer(each)["input_ids"] if isinstance(each, str) else each) for each in prompts]
    except (UnicodeEncodeError, TypeError):  # as the tokenizer says it
        raise ApiError(400, "the text has half a surrogate pair, which is no character", param="prompt") from None
    if not found or not all(found):
        raise ApiError(400, "a prompt is empty", param="prompt")
    if any(not 0 <= token < vocab for ids in found for token in ids):
        raise ApiError(400, f"a token id is outside the vocabulary of {vocab:,}", param="prompt")
    return found


def served_source(target: str, *, best: bool = False, checkpoint: int | None = None) -> ModelSource:
    """What a name on the command line means; see `find_source`.

    Raises:
        UserError: its weights are in a checkpoint, which the engine does not read.
        TrainerError: the name means nothing.
    """
    source = find_source(target, best=best, checkpoint=checkpoint)
    if source.checkpoint is not None:
        step = step_number(source.checkpoint.name)
        remedy = f"run `trainer export {target} --checkpoint {step}` and serve what it wrote"
        raise UserError(f"{target}: a checkpoint is not served; {remedy}")
    return source
