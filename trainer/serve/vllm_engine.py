"""vLLM behind the gateway: its client, with the same sequences and adapters as the embedded engine's.

Requests go to /v1/completions of a supervised server as token ids and come back as token ids; nothing else of vLLM is
used. Each version of an adapter has a name of its own there, since vLLM's prefix cache is keyed by name.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Final, final

import httpx

from trainer.engine.protocol import Sampling
from trainer.errors import LaunchError, ModelError
from trainer.http import direct_client
from trainer.managed.place import ServerPlace, accepts
from trainer.serve.adapter_file import adapter_digest, refuse_not_finite
from trainer.serve.api_errors import ApiError
from trainer.serve.engine_client import End, LostError, Token, can_continue, rest_of, untold_end

ATTEMPTS: Final = 3
"""Servers that a request is sent to, one after the other."""
READY_S: Final = 600.0
"""How long a request waits for a server that is being started again."""
POLL_S: Final = 0.1
DYING_S: Final = 0.5
"""After a request was lost: until the supervisor sees that the server has ended."""
LOAD_TIMEOUT_S: Final = 300.0
URL: Final = "http://vllm"
SEED_STEP: Final = 1_000_003
"""Between the seeds of a sequence and of its continuation at the next token."""
SEEDS: Final = 1 << 62
SILENT_S: Final = 600.0
"""Longest time between two tokens, and until the first one."""


@final
@dataclass(frozen=True)
class _Version:
    """An adapter as vLLM has it."""

    label: str
    """Name and digest; its name in vLLM."""
    path: Path


@final
class VllmEngine:
    """Sends sequences to vLLM and yields their tokens."""

    def __init__(self, place: ServerPlace, base: str, hello: dict[str, Any]) -> None:
        """Keep the place; nothing is sent yet.

        Args:
            place: of the supervised server.
            base: name of the base model there.
            hello: `window` and `vocab`.
        """
        self.hello = hello
        self._place, self._base = place, base
        self._adapters: dict[str, _Version] = {}
        self._uses: Counter[str] = Counter()
        """Sequences in flight by version."""
        self._retired: set[str] = set()
        """Versions that are unloaded once no sequence uses them."""
        self._num_live = 0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        transport = httpx.AsyncHTTPTransport(uds=str(place.socket), limits=limits)
        self._http = httpx.AsyncClient(transport=transport, timeout=SILENT_S, trust_env=False, base_url=URL)

    @property
    def is_ready(self) -> bool:
        """Whether the server answers."""
        return accepts(self._place.socket)

    @property
    def num_live(self) -> int:
        """Sequences in flight."""
        return self._num_live

    async def close(self) -> None:
        """Close connections."""
        await self._http.aclose()

    def restore(self, socket: Path) -> None:
        """Load every adapter on a server that was started, before requests reach it.

        Args:
            socket: of the new server.

        Raises:
            LaunchError: it refuses one.
        """
        with direct_client(socket) as client:
            for version in self._adapters.values():
                body = {"lora_name": version.label, "lora_path": str(version.path)}
                reply = client.post(f"{URL}/v1/load_lora_adapter", json=body, timeout=LOAD_TIMEOUT_S)
                if not reply.is_success:
                    raise LaunchError(f"{version.label}: {_message(reply.content)}")

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Load or unload an adapter, or report counts.

        Args:
            op: `load`, `unload` or `stats`.
            **fields: `name` and `path`.
        """
        match op:
            case "load":
                return await self._load(fields["name"], Path(fields["path"]))
            case "unload":
                version = self._adapters.pop(fields["name"], None)
                if version is None:
                    return {"ok": False, "error": f"no adapter {fields['name']!r} is loaded"}
                await self._retire(version.label)
                return {"ok": True}
            case "stats":
                return {"ok": True, "live": self._num_live, "loaded": len(self._adapters)}
            case other:
                return {"ok": False, "error": f"unknown op {other!r}"}

    async def _load(self, name: str, path: Path) -> dict[str, Any]:
        """Load a version; requests from now on use it, those in flight keep theirs."""
        try:
            await asyncio.to_thread(refuse_not_finite, path)
            version = _Version(f"{name}@{await asyncio.to_thread(adapter_digest, path)}", path)
        except ModelError as error:
            return {"ok": False, "error": str(error)}
        before = self._adapters.get(name)
        if before != version:
            body = {"lora_name": version.label, "lora_path": str(path)}
            try:
                reply = await self._http.post("/v1/load_lora_adapter", json=body, timeout=LOAD_TIMEOUT_S)
            except httpx.RequestError as error:
                return {"ok": False, "error": f"vLLM went away while it loaded {name} ({error}); send it again"}
            if not reply.is_success and "has already been loaded" not in _message(reply.content):
                return {"ok": False, "error": _message(reply.content)}
        self._retired.discard(version.label)
        self._adapters[name] = version
        if before is not None and before.label != version.label:
            await self._retire(before.label)
        return {"ok": True, "version": version.label}

    async def _retire(self, label: str) -> None:
        """Unload a version now, or when its last sequence ends."""
        self._retired.add(label)
        if self._uses[label]:
            return
        self._retired.discard(label)
        with suppress(httpx.RequestError):  # a server that went away has lost it anyway
            await self._http.post("/v1/unload_lora_adapter", json={"lora_name": label}, timeout=LOAD_TIMEOUT_S)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        """Yield the tokens of a sequence, then its end; closing the iterator cancels it.

        A server that goes away is started again: a sequence without tokens is sent again, one with tokens goes on from
        them. It goes on with other noise, since vLLM's cannot be continued: a valid sample, not the one that was lost.

        Args:
            prompt: token ids.
            sampling: how tokens are drawn.
            adapter: None is the base.

        Raises:
            ApiError: the server refuses the request, or none is there.
        """
        version = None
        if adapter is not None:
            version = self._adapters.get(adapter)
            if version is None:
                raise ApiError(404, f"no adapter {adapter!r} is loaded", param="model", code="model_not_found")
            self._uses[version.label] += 1
        self._num_live += 1
        try:
            async with aclosing(self._through_restarts(prompt, sampling, version)) as events:
                async for event in events:
                    yield event
        finally:
            self._num_live -= 1
            if version is not None:
                self._uses[version.label] -= 1
                if version.label in self._retired:
                    await asyncio.shield(self._retire(version.label))

    async def _through_restarts(
        self, prompt: Sequence[int], sampling: Sampling, version: _Version | None
    ) -> AsyncGenerator[Token | End, None]:
        drawn: list[int] = []
        label = None if version is None else version.label
        for attempt in range(ATTEMPTS):
            await self._wait_ready()
            try:
                rest = rest_of(sampling, drawn)
                async with aclosing(self._stream([*prompt, *drawn], rest, label or self._base)) as events:
                    async for event in events:
                        if isinstance(event, Token):
                            drawn.append(event.token)
                            yield event
                        else:
                            yield replace(event, version=label)
                return
            except (LostError, httpx.RequestError):
                if attempt + 1 == ATTEMPTS or (drawn and not can_continue(sampling)):
                    raise ApiError(503, "the engine went away during this request; send it again", retry_s=1) from None
                await asyncio.sleep(DYING_S)
                if (end := untold_end(sampling, drawn)) is not None:
                    yield replace(end, version=label)
                    return

    async def _wait_ready(self) -> None:
        deadline = monotonic() + READY_S
        while not self.is_ready:
            if self._place.failed_file.exists():
                raise ApiError(503, "vLLM was given up; the server's log says why")
            if monotonic() > deadline:
                raise ApiError(503, "no engine is ready", retry_s=10)
            await asyncio.sleep(POLL_S)

    async def _stream(self, prompt: Sequence[int], sampling: Sampling, model: str) -> AsyncGenerator[Token | End, None]:
        """The events of one request.

        Raises:
            ApiError: the server refuses it.
            LostError: the server is ending.
        """
        body = request_body(prompt, sampling, model)
        if not body["stream"]:
            reply = await self._http.post("/v1/completions", json=body)
            if not reply.is_success:
                raise _refusal(reply.status_code, reply.content)
            for event in events_of(reply.json()["choices"][0], prompt, sampling):
                yield event
            return
        async with self._http.stream("POST", "/v1/completions", json=body) as reply:
            if not reply.is_success:
                raise _refusal(reply.status_code, await reply.aread())
            async for choice in _choices(reply):
                for event in events_of(choice, prompt, sampling):
                    yield event
                    if isinstance(event, End):
                        return
        raise LostError


async def _choices(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The choices of a stream of server-sent events."""
    async for text in reply.aiter_lines():
        if not text.startswith("data: {"):
            continue
        document = json.loads(text[6:])
        if "error" in document:
            raise _refusal(int(document["error"].get("code") or 500), text[6:].encode())
        if document.get("choices"):
            yield document["choices"][0]


def events_of(choice: Mapping[str, Any], prompt: Sequence[int], sampling: Sampling) -> list[Token | End]:
    """Tokens of a choice, or of a part of it, and its end."""
    tokens, logprobs = choice.get("token_ids") or [], choice.get("logprobs") or {}
    events: list[Token | End] = []
    if sampling.max_tokens:  # with none only the prompt was asked for, and vLLM draws at least one
        events += [Token(token, _report(logprobs, index, sampling.logprobs)) for index, token in enumerate(tokens)]
    reason = choice.get("finish_reason")
    if reason in ("abort", "error"):
        raise LostError
    if reason is not None:
        known = zip(prompt[1:], (choice.get("prompt_logprobs") or [None])[1:], strict=False)
        reports = tuple(_prompt_report(token, places, sampling.prompt_logprobs or 0) for token, places in known)
        events.append(End(str(reason) if sampling.max_tokens else "length", prompt_logprobs=reports))
    return events


def _report(logprobs: Mapping[str, Any], index: int, wanted: int | None) -> dict[str, Any] | None:
    """Log-probability of a token, and its likeliest alternatives, in the form of the embedded engine."""
    if wanted is None:
        return None
    alternatives = [(_token_id(name), value) for name, value in (logprobs["top_logprobs"][index] or {}).items()]
    return {"logprob": logprobs["token_logprobs"][index], "top": _likeliest(alternatives, wanted)}


def _prompt_report(token: int, places: Mapping[str, Any], wanted: int) -> dict[str, Any]:
    """The same of a prompt's token."""
    alternatives = [(int(name), each["logprob"]) for name, each in places.items()]
    return {"logprob": places[str(token)]["logprob"], "top": _likeliest(alternatives, wanted)}


def _likeliest(alternatives: list[tuple[int, float]], number: int) -> list[list[Any]]:
    """Without the drawn token, which vLLM adds where it is not among them."""
    return [list(each) for each in sorted(alternatives, key=lambda each: -each[1])[:number]]


def _token_id(name: str) -> int:
    """Of `token_id:42`."""
    return int(name.rpartition(":")[2])


def request_body(prompt: Sequence[int], sampling: Sampling, model: str) -> dict[str, Any]:
    """A request of vLLM that draws what the embedded engine would be asked for."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max(1, sampling.max_tokens),
        "seed": (sampling.seed + sampling.sample + SEED_STEP * sampling.first_position) % SEEDS,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": sampling.grammar is None,  # its end of text is among our stop ids; a grammar may end only there
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stream": sampling.prompt_logprobs is None,  # vLLM streams no log-probabilities of prompts
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }
    optional: dict[str, Any] = {
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias} or None,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "structured_outputs": None if sampling.grammar is None else {"grammar": as_lark(sampling.grammar)},
    }
    return body | {name: value for name, value in optional.items() if value is not None}


def as_lark(grammar: str) -> str:
    """A grammar in the only form of llguidance's that vLLM takes.

    >>> print(as_lark('{"grammars": [{"json_schema": {"type": "integer"}}]}'))
    %llguidance {}
    start: %json {"type": "integer"}

    Args:
        grammar: of structure.py, one JSON Schema, or of tools.py, which is Lark.
    """
    if not grammar.startswith("{"):
        return grammar
    (only,) = json.loads(grammar)["grammars"]
    return f"%llguidance {{}}\nstart: %json {json.dumps(only['json_schema'])}"


def _refusal(status: int, content: bytes) -> ApiError | LostError:
    """What an error response means: the request is wrong, or the server is ending."""
    return ApiError(status, _message(content)) if 400 <= status < 500 else LostError()


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:500].decode("utf-8", "replace")
