"""The gateway's state: models, engine, limits, counters; and what requests become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from prometheus_client import CollectorRegistry, Counter, Histogram

from trainer.errors import TrainerError, UserError
from trainer.inference.source import ModelSource, find_source
from trainer.run.step_names import step_number
from trainer.serve.api_errors import ApiError
from trainer.serve.choices import Job, samples
from trainer.serve.engine import Engine
from trainer.serve.models import Served, ServedModels
from trainer.serve.requests import ChatRequest, CompletionRequest
from trainer.serve.structure import grammar_of
from trainer.serve.tools import tool_grammar, tools_of

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


@final
class Gateway:
    """Turns requests into sequences of the engine."""

    def __init__(self, models: ServedModels, engine: Engine, limits: Limits) -> None:
        """Begin with the adapters that `models` has.

        Args:
            models: what requests may name.
            engine: continues sequences.
            limits: of this server.
        """
        self.models, self.engine, self.limits, self.metrics = models, engine, limits, Metrics()
        self.is_draining = False

    def admit(self, count: int) -> None:
        """Refuse sequences beyond the limit.

        Raises:
            ApiError: 429 with a time to wait, or 503 while the server ends.
        """
        if self.is_draining:
            raise ApiError(503, "the server is ending", retry_s=5)
        if self.engine.num_live + count > self.limits.max_queue:
            raise ApiError(
                429, f"{self.engine.num_live} sequences are in flight, the most is {self.limits.max_queue}", retry_s=1
            )

    def chat_jobs(self, request: ChatRequest) -> list[Job]:
        """The sequences of a chat request.

        Raises:
            ApiError: the request cannot be answered, with the reason.
        """
        served = self.models.find(request.model)
        grammar = grammar_of(request)
        tools = tools_of(request, served)
        if tools:
            grammar = tool_grammar(request, tools)
        prompt = served.prompt_ids(request.messages, request.tools, self._template_arguments(request, served))
        limit = self._limit(request.limit, prompt)
        vocab = int(self.engine.hello["vocab"])
        sampling = request.sampling(limit, served.stop_ids, vocab, request.num_logprobs, grammar)
        return samples(Job(prompt, sampling, served, request.stops), request.num_choices)

    def completion_jobs(self, request: CompletionRequest) -> list[Job]:
        """The sequences of a plain completion: `n` for each prompt.

        Raises:
            ApiError: the request cannot be answered, with the reason.
        """
        served = self.models.find(request.model)
        for name in ("suffix", "echo"):
            if getattr(request, name):
                raise ApiError(400, f"{name} is not supported", param=name)
        if request.best_of not in (None, request.num_choices):
            raise ApiError(400, "best_of is supported only where it equals n", param="best_of")
        vocab = int(self.engine.hello["vocab"])
        jobs = []
        for prompt in _prompts(request.prompt, served):
            limit = self._limit(DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens, prompt)
            sampling = request.sampling(limit, served.stop_ids, vocab, request.logprobs)
            job = Job(prompt, sampling, served, request.stops, request.skip_special_tokens)
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

    def _template_arguments(self, request: ChatRequest, served: Served) -> Mapping[str, Any]:
        arguments = dict(request.chat_template_kwargs or {})
        effort = request.reasoning_effort
        if effort is None:
            return arguments
        template = served.encoder.template if served.encoder is not None else None
        if template is not None and template.names("enable_thinking"):
            return {"enable_thinking": effort != "none", **arguments}
        if template is not None and template.names("reasoning_effort"):
            return {"reasoning_effort": effort, **arguments}
        if effort == "none":
            return arguments  # a template without a switch does not think
        raise ApiError(400, f"the chat template of {served.name} has no switch for reasoning", param="reasoning_effort")

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


def _prompts(prompt: Any, served: Served) -> list[tuple[int, ...]]:
    """Token ids of each prompt; texts are tokenized with the special tokens that the tokenizer adds."""
    if isinstance(prompt, str):
        return [tuple(served.tokenizer(prompt)["input_ids"])]
    if not prompt:
        raise ApiError(400, "the list of prompts is empty", param="prompt")
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [tuple(served.tokenizer(each)["input_ids"]) if isinstance(each, str) else tuple(each) for each in prompt]


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
