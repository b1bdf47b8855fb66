"""The engine's loop: commands between steps, adapters loaded aside and swapped in."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, final

import psutil

from trainer.engine.adapters import AdapterVersion
from trainer.engine.connections import Client, Connections
from trainer.engine.grammar import Grammars
from trainer.engine.model import EngineModel
from trainer.engine.own_model import OwnModel
from trainer.engine.protocol import Sampling
from trainer.engine.scheduler import Scheduler
from trainer.engine.sequences import LiveSequence
from trainer.errors import ModelError, UserError

Key: TypeAlias = tuple[int, str]
"""Client and id of a request."""


@final
class Service:
    """Answers the clients of one engine."""

    def __init__(
        self, model: EngineModel | OwnModel, scheduler: Scheduler, grammars: Grammars, connections: Connections
    ) -> None:
        """Begin without adapters."""
        self._model, self._scheduler, self._grammars, self._connections = model, scheduler, grammars, connections
        self._adapters: dict[str, AdapterVersion] = {}
        self._live: dict[Key, tuple[Client, LiveSequence]] = {}
        self._key_of: dict[LiveSequence, Key] = {}
        self._loaded: SimpleQueue[tuple[Client, str, AdapterVersion | str]] = SimpleQueue()
        self._process = psutil.Process()
        self._is_stopping = False

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._is_stopping:
            self._take_commands()
            self._swap_loaded()
            if not self._scheduler.is_idle:
                self._step()

    def stop(self) -> None:
        """End after the present step."""
        self._is_stopping = True

    def _take_commands(self) -> None:
        wait_s = 0.05 if self._scheduler.is_idle else 0.0
        while True:
            try:
                client, message = (
                    self._connections.commands.get(timeout=wait_s)
                    if wait_s
                    else self._connections.commands.get_nowait()
                )
            except Empty:
                return
            wait_s = 0.0
            self._obey(client, message)

    def _obey(self, client: Client, message: dict[str, Any] | None) -> None:
        if message is None:
            for key in [key for key in self._live if key[0] == id(client)]:
                self._cancel(key, is_told=False)
            return
        match message.get("op"):
            case "generate":
                self._generate(client, message)
            case "cancel":
                self._cancel((id(client), message["id"]), is_told=True)
            case "load":
                threading.Thread(target=self._load, args=(client, message), daemon=True).start()
            case "unload":
                gone = self._adapters.pop(message["name"], None)
                error = None if gone is not None else f"no adapter {message['name']!r} is loaded"
                client.send({"reply": message["id"], "ok": gone is not None, "error": error})
            case "stats":
                client.send({"reply": message["id"], "ok": True, **self._stats()})
            case other:
                client.send({"reply": message.get("id"), "ok": False, "error": f"unknown op {other!r}"})

    def _generate(self, client: Client, message: dict[str, Any]) -> None:
        name, request, prompt = message.get("adapter"), message["id"], tuple(message["prompt"])
        sampling = Sampling.of_json(message["sampling"])
        problem = self._scheduler.problem(prompt, sampling.max_tokens)
        adapter = self._adapters.get(name) if name is not None else None
        if name is not None and adapter is None:
            problem = f"no adapter {name!r} is loaded"
        matcher = None
        if problem is None and sampling.grammar is not None:
            try:
                matcher = self._grammars.matcher(sampling.grammar)
            except UserError as error:
                problem = str(error)
        if problem is not None:
            client.send({"end": request, "reason": "error", "message": problem, "is_request_wrong": True})
            return
        sequence = LiveSequence(request, prompt, sampling, adapter, matcher)
        key = (id(client), request)
        self._live[key], self._key_of[sequence] = (client, sequence), key
        self._scheduler.add(sequence)

    def _cancel(self, key: Key, *, is_told: bool) -> None:
        client, sequence = self._live.pop(key, (None, None))
        if client is None or sequence is None:
            return
        del self._key_of[sequence]
        self._scheduler.cancel(sequence)
        if is_told:
            client.send(_end(sequence, "cancelled", None))

    def _load(self, client: Client, message: dict[str, Any]) -> None:
        """Read an adapter beside the steps."""
        result: AdapterVersion | str
        try:
            result = self._model.adapter(message["name"], Path(message["path"]))
        except ModelError as error:
            result = str(error)
        self._loaded.put((client, message["id"], result))

    def _swap_loaded(self) -> None:
        """Let new requests use adapters that were loaded; those in flight keep theirs."""
        while not self._loaded.empty():
            client, request, result = self._loaded.get()
            if isinstance(result, str):
                client.send({"reply": request, "ok": False, "error": result})
                continue
            self._adapters[result.name] = result
            client.send({"reply": request, "ok": True, "version": result.label, "rank": result.rank})

    def _step(self) -> None:
        result = self._scheduler.step()
        tokens: dict[int, tuple[Client, list[Any], dict[str, Any]]] = {}
        for sequence, token, report in result.tokens:
            key = self._key_of[sequence]
            client = self._live[key][0]
            _, drawn, began = tokens.setdefault(id(client), (client, [], {}))
            drawn.append([sequence.id, token, report])
            if (times := sequence.begin()) is not None:
                began[sequence.id] = times
        for client, drawn, began in tokens.values():
            client.send({"tokens": drawn, **({"began": began} if began else {})})
        for sequence, reason, error in result.ended:
            client, _ = self._live.pop(self._key_of.pop(sequence))
            client.send(_end(sequence, reason, error))

    def _stats(self) -> dict[str, Any]:
        scheduler, pool = self._scheduler, self._scheduler.pool
        times = self._process.cpu_times()
        return {
            "memory_bytes": self._process.memory_info().rss,
            "cpu_ms": round(1000 * (times.user + times.system)),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "live": len(self._live),
            "pages": pool.num_pages,
            "pages_used": pool.num_used,
            "pages_cached": pool.num_cached,
            "adapters": {name: adapter.label for name, adapter in self._adapters.items()},
            **vars(scheduler.counters),
        }


def _end(sequence: LiveSequence, reason: str, error: str | None) -> dict[str, Any]:
    message: dict[str, Any] = {
        "end": sequence.id,
        "reason": reason,
        "prompt_tokens": len(sequence.prompt),
        "cached_tokens": sequence.num_cached,
        "version": None if sequence.adapter is None else sequence.adapter.label,
    }
    if error is not None:
        message["message"] = error
    if sequence.prompt_logprobs:
        message["prompt_logprobs"] = sequence.prompt_logprobs
    return message
