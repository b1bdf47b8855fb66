"""Sampling for training clients: requests to the engine, and their results until they are fetched."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from trainer.api.wire import Drawn, write_samples
from trainer.engine.protocol import Sampling
from trainer.serve.api_errors import ApiError
from trainer.serve.engine import Engine
from trainer.serve.engine_client import Token
from trainer.serve.gateway import Gateway
from trainer.serve.metering import Counted

KEPT_S: Final = 600.0
"""How long the result of a sample request is kept."""
MAX_ADAPTERS: Final = 16
"""Adapters of training clients in the engine; the one that was not used for longest is unloaded."""
MAX_SAMPLES: Final = 1024
TAIL: Final = 16
"""Tokens decoded to find a stop string, beyond its own length."""


class Chunk(BaseModel):
    """A part of a prompt."""

    model_config = ConfigDict(extra="allow")
    type: str = "encoded_text"
    tokens: list[int] | None = None


class ModelInput(BaseModel):
    """A prompt."""

    chunks: list[Chunk]


class SamplingBody(BaseModel):
    """How tokens are drawn."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleBody(BaseModel):
    """POST /api/v1/asample."""

    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingBody
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


@final
@dataclass(frozen=True)
class Draws:
    """A sample request, checked."""

    prompt: tuple[int, ...]
    sampling: Sampling
    count: int
    stops: tuple[str, ...]
    top_prompt: int | None
    """Likeliest tokens at each position of the prompt; None reports no log-probabilities of the prompt."""
    top_sample: int
    last_n: int | None


def draws_of(body: SampleBody, gateway: Gateway, stop_ids: Sequence[int], noise: str) -> Draws:
    """Check a request.

    Args:
        body: the request.
        gateway: knows window and vocabulary.
        stop_ids: the model's own, where the client names none.
        noise: names the request; seeds it where the client gives no seed.

    Raises:
        ApiError: it asks for what this server does not do, or for what cannot be.
    """
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    how, vocab, window = body.sampling_params, int(gateway.engine.hello["vocab"]), int(gateway.engine.hello["window"])
    tokens: list[int] = []
    for chunk in body.prompt.chunks:
        if chunk.type != "encoded_text" or chunk.tokens is None:
            raise ApiError(
                400, f"prompt: a chunk of type {chunk.type!r}; this server samples from text", param="prompt"
            )
        tokens += chunk.tokens
    if not tokens or any(not 0 <= token < vocab for token in tokens):
        raise ApiError(400, f"prompt: empty, or a token that is not 0 to {vocab - 1:,}", param="prompt")
    if not 1 <= body.num_samples <= MAX_SAMPLES:
        raise ApiError(400, f"num_samples {body.num_samples}: 1 to {MAX_SAMPLES:,}", param="num_samples")
    room = window - len(tokens)
    limit = room if how.max_tokens is None else how.max_tokens
    if room < 1 or not 0 <= limit <= room:
        raise ApiError(
            400,
            f"the prompt has {len(tokens):,} tokens and max_tokens is {limit:,}; together at most {window:,} fit",
            param="max_tokens",
        )
    if not 0 <= how.temperature <= 100 or not 0 < how.top_p <= 1:
        raise ApiError(400, "temperature is 0 to 100, top_p above 0 to 1", param="sampling_params")
    stop = [how.stop] if isinstance(how.stop, str) else how.stop
    ends = tuple(stop_ids) if stop is None else tuple(each for each in stop if isinstance(each, int))
    seed = how.seed
    if seed is None:
        seed = int.from_bytes(hashlib.sha256(noise.encode()).digest()[:7], "big")
    wants_prompt = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    top_prompt = body.topk_prompt_logprobs if wants_prompt else None
    sampling = Sampling(
        max_tokens=limit,
        seed=seed,
        stop_ids=ends,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=max(0, how.top_k),
        logprobs=body.topk_sample_logprobs,
    )
    stops = tuple(each for each in stop or () if isinstance(each, str) and each)
    return Draws(
        tuple(tokens), sampling, body.num_samples, stops, top_prompt, body.topk_sample_logprobs,
        body.prompt_logprobs_last_n,
    )  # fmt: skip


@final
class EngineAdapters:
    """Adapters of training clients in the engine, loaded when they are first used."""

    def __init__(self, engine: Engine) -> None:
        """Begin with none."""
        self._engine = engine
        self._loaded: OrderedDict[str, str] = OrderedDict()
        self._lock = asyncio.Lock()

    def paths(self) -> dict[str, str]:
        """Directory by name: what a new engine must load."""
        return {name: path for name, path in self._loaded.items() if Path(path).is_dir()}

    async def name_of(self, directory: str) -> str:
        """The name of a directory's adapter in the engine.

        Raises:
            ApiError: it cannot be served.
        """
        name = "training-" + hashlib.sha256(directory.encode()).hexdigest()[:16]
        async with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return name
            reply = await self._engine.ask("load", name=name, path=directory)
            if not reply["ok"]:
                raise ApiError(400, str(reply["error"]))
            self._loaded[name] = directory
            while len(self._loaded) > MAX_ADAPTERS:
                oldest, _ = self._loaded.popitem(last=False)
                await self._engine.ask("unload", name=oldest)
            return name


@final
class Samples:
    """Sample requests in flight, and results that wait to be fetched."""

    def __init__(self, gateway: Gateway, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begin without requests.

        Args:
            gateway: has the engine.
            tokenizer: decodes what stop strings are looked for in.
        """
        self._gateway, self._tokenizer = gateway, tokenizer
        self.adapters = EngineAdapters(gateway.engine)
        self._tasks: dict[str, tuple[str, asyncio.Task[bytes]]] = {}
        self._done: dict[str, float] = {}

    def has(self, request: str) -> bool:
        """Whether a request has begun, and its result is still kept."""
        self._clean()
        return request in self._tasks

    def start(self, owner: str, request: str, draws: Draws, directory: str | None, counted: Counted) -> None:
        """Begin to sample; the same request again changes nothing.

        Args:
            owner: account.
            request: id of the request.
            draws: what to draw.
            directory: of the adapter; None is the base.
            counted: closed with the tokens that were drawn, whatever comes of the request.

        Raises:
            ApiError: too many sequences are in flight.
        """
        self._clean()
        if request in self._tasks:
            return
        admission, drawn = ExitStack(), [0]
        try:
            admission.enter_context(self._gateway.admitted(draws.count))
        except ApiError:
            counted.close(0)
            raise
        task = asyncio.create_task(self._draw_all(draws, directory, drawn))
        task.add_done_callback(lambda _: admission.close())
        task.add_done_callback(lambda _: counted.close(drawn[0]))
        task.add_done_callback(lambda _: self._done.setdefault(request, time.monotonic()))
        self._tasks[request] = owner, task

    async def wait(self, owner: str, request: str, timeout_s: float) -> bytes | None:
        """The result; None: not yet.

        Raises:
            ApiError: the request failed, or there is none: a client then sends it again.
        """
        found = self._tasks.get(request)
        if found is None or found[0] != owner:
            raise ApiError(410, f"there is no sample request {request}: the server was restarted, or it is too old")
        done, _ = await asyncio.wait({found[1]}, timeout=timeout_s)
        return found[1].result() if done else None

    def cancel(self, owner: str, request: str) -> None:
        """Stop a request."""
        found = self._tasks.get(request)
        if found is not None and found[0] == owner:
            found[1].cancel()

    def _clean(self) -> None:
        limit = time.monotonic() - KEPT_S
        for request in [each for each, when in self._done.items() if when < limit]:
            del self._done[request], self._tasks[request]

    async def _draw_all(self, draws: Draws, directory: str | None, num_drawn: list[int]) -> bytes:
        """The result; `num_drawn[0]` counts tokens as they come, also of a request that fails."""
        adapter = None if directory is None else await self.adapters.name_of(directory)
        work = [self._draw(draws, index, adapter, num_drawn) for index in range(draws.count)]
        drawn = await asyncio.gather(*work)
        logprobs, top = None, None
        if draws.top_prompt is not None:
            reports = await self._score_prompt(draws, draws.top_prompt, adapter)
            logprobs = [None, *(float(report["logprob"]) for report in reports)]
            if draws.last_n is not None:
                logprobs[: -draws.last_n] = [None] * (len(logprobs) - draws.last_n)
            if draws.top_prompt:
                top = [[], *([(int(a), float(b)) for a, b in report["top"]] for report in reports)]
        return write_samples(
            [each for each, _ in drawn], prompt_logprobs=logprobs, top_prompt=top, cached_tokens=drawn[0][1]
        )

    async def _score_prompt(self, draws: Draws, number: int, adapter: str | None) -> Sequence[dict[str, Any]]:
        """Log-probabilities of the prompt, from its second token on."""
        sampling = Sampling(max_tokens=0, seed=0, prompt_logprobs=number)
        async with aclosing(self._gateway.engine.generate(draws.prompt, sampling, adapter)) as events:
            async for event in events:
                if not isinstance(event, Token):
                    return event.prompt_logprobs
        raise ApiError(500, "the engine ended a sequence without a word")

    async def _draw(self, draws: Draws, index: int, adapter: str | None, num_drawn: list[int]) -> tuple[Drawn, int]:
        """One sequence, and how many tokens of its prompt were not computed again."""
        tokens: list[int] = []
        logprobs: list[float] = []
        top: list[list[tuple[int, float]]] = []
        events = self._gateway.engine.generate(draws.prompt, replace(draws.sampling, sample=index), adapter)
        async with aclosing(events):
            async for event in events:
                if not isinstance(event, Token):
                    return Drawn(tokens, logprobs, event.reason == "stop", top), event.cached_tokens
                assert event.report is not None
                tokens.append(event.token)
                num_drawn[0] += 1
                logprobs.append(float(event.report["logprob"]))
                if draws.top_sample:
                    top.append([(int(a), float(b)) for a, b in event.report["top"]])
                if draws.stops and self._has_stop(tokens, draws.stops):
                    return Drawn(tokens, logprobs, is_stopped=True, top=top), 0
        raise ApiError(500, "the engine ended a sequence without a word")

    def _has_stop(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether the newest token completes a stop string."""
        tail = TAIL + max(len(stop.encode()) for stop in stops)
        text = self._tokenizer.decode(list(tokens[-tail:]), skip_special_tokens=False)
        return any(stop in text for stop in stops)


def sample_body(raw: bytes) -> SampleBody:
    """Read a request.

    Raises:
        ApiError: it is none.
    """
    try:
        return SampleBody.model_validate(json.loads(raw))
    except ValueError as error:
        raise ApiError(400, f"asample: {str(error).splitlines()[0]}") from None
