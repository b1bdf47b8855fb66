"""HTTP client of a server that samples, vLLM or `trainer serve`: its calls, retries and errors."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, final
from urllib.parse import urlsplit

import httpx

from trainer.config.unsupported import server_url_problem
from trainer.errors import LaunchError, TrainerError, UserError
from trainer.http import direct_client
from trainer.managed.place import ServerPlace, accepts
from trainer.managed.vllm import servable_rank

PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between attempts. They cover a dropped connection; a server that was restarted has lost the adapter."""
CALL_TIMEOUT_S: Final = 30.0
FIRST_TIMEOUT_S: Final = 300.0
"""A server compiles at its first request."""
UNAVAILABLE: Final = (502, 503, 504)
BUSY: Final = 429
BUSY_S: Final = 1.0
"""Before a request is sent again to a server that is full, where it does not say how long."""
API_KEYS: Final = ("VLLM_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the server's key, if it has one: the first that is set."""
RESTARTS: Final = 3
"""How often one call is tried again because its server was restarted meanwhile."""
DYING_S: Final = 1.0
"""After an error of a server that is about to end: until its supervisor sees it."""
OURS: Final = "tunesmith"
"""`owned_by` of the models of `trainer serve`."""
T = TypeVar("T")

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
PROBE_TEMPERATURE: Final = 2.0
PROBE_TOP: Final = 5
UNTOUCHED: Final[dict[str, Any]] = {
    "ignore_eos": True,  # the recipe's stop tokens are sent; the model's own may differ
    "skip_special_tokens": False,  # stop strings may contain them
    "repetition_penalty": 1.0,  # a model's generation_config.json would set defaults for what is left out
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "return_token_ids": True,
}
"""Fields of every request, so that no default of the server changes the distribution."""


@final
class SamplerError(UserError):
    """A sampling server that cannot be reached, or is unsuitable for training."""


@final
@dataclass(frozen=True)
class Answer:
    """JSON object of a response, and which adapter version gave it."""

    body: dict[str, Any]
    version: str | None
    """Of the header X-Adapter-Version, which `trainer serve` sends."""


@final
class RefusedError(TrainerError):
    """An error response to one request, which the caller explains."""

    def __init__(self, url: str, status: int, message: str) -> None:
        """Keep status and message.

        Args:
            url: of the request.
            status: HTTP status code.
            message: text of the response.
        """
        super().__init__(f"{url}: HTTP {status}: {message}")
        self.status, self.message = status, message


@final
@dataclass(frozen=True)
class Served:
    """Properties of a server: reported ones, and the measured mode of its logprobs."""

    base: str
    """Name of the base model."""
    root: str
    """Path or name from which the server loaded it."""
    max_model_tokens: int
    logprobs_mode: LogprobsMode
    """`raw_logprobs` are at temperature 1, `processed_logprobs` after temperature, top_p, top_k and min_p."""
    is_ours: bool = False
    """Whether it is `trainer serve`, which replaces an adapter under its name and reports versions."""


@final
class ServerClient:
    """One server; safe to use from several threads."""

    def __init__(self, url: str, *, model: str, place: ServerPlace | None = None, socket: Path | None = None) -> None:
        """Keep the address; nothing is sent yet.

        Args:
            url: http or https, without a path.
            model: that it should serve, for error messages.
            place: of a server that the run supervises; `url` is then a name for messages, and calls wait for a
                server that is being restarted.
            socket: Unix socket to connect to instead; no call waits for a restart.
        """
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        problem = server_url_problem(url)
        if problem is not None:
            raise SamplerError(f"the address of a server {problem}")
        self._place = place
        self._http = direct_client(place.socket if place is not None else socket)

    @property
    def is_supervised(self) -> bool:
        """Whether the run started the server."""
        return self._place is not None

    def through_restarts(self, act: Callable[[], T]) -> T:
        """Call, and call again if it failed while the server was restarted.

        Args:
            act: sends requests of this client; may be repeated as a whole.
        """
        for _ in range(RESTARTS):
            before = self._start()
            try:
                return act()
            except (RefusedError, SamplerError):
                if self._place is None or self._start() == before:
                    raise
                self._wait_ready()
        return act()

    def _start(self) -> str | None:
        """Which start of a supervised server answers; None while none does."""
        if self._place is None or not self._place.socket.is_symlink():
            return None
        try:
            return str(self._place.socket.readlink())
        except OSError:
            return None

    def _wait_ready(self) -> None:
        assert self._place is not None
        try:
            self._place.wait_ready()
        except LaunchError as error:
            raise SamplerError(str(error)) from None

    def command(self, rank: int = 16) -> str:
        """The command that starts a suitable server at this address."""
        address = urlsplit(self.url)
        return (
            "  VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server "
            f"--model {self.model} --host {address.hostname} --port {address.port or 80} --dtype bfloat16 "
            f"--enable-lora --max-lora-rank {servable_rank(rank)} --logprobs-mode processed_logprobs "
            "--generation-config vllm"
        )

    def look(self, prompt: Sequence[int], vocab_size: int) -> Served:
        """Find the served model, and the mode of its logprobs from one prompt at two temperatures.

        Args:
            prompt: token ids of any text.
            vocab_size: of the model, approximately.

        Raises:
            SamplerError: there is no server, or its logprobs are unsuitable for training.
        """
        base = next((card for card in self.models(is_first_contact=True) if card.get("parent") is None), None)
        if base is None:
            raise SamplerError(f"{self.url} serves no model")
        request = {"model": base["id"], "prompt": prompt, "max_tokens": 1, "seed": 0, "logprobs": PROBE_TOP}
        spreads, masses = [], []
        for temperature in (1.0, PROBE_TEMPERATURE):
            body = {**UNTOUCHED, **request, "temperature": temperature, "return_tokens_as_token_ids": True}
            response = self.post("/v1/completions", body, timeout_s=FIRST_TIMEOUT_S)
            highest = sorted(response["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)[:PROBE_TOP]
            spreads.append(highest[0] - highest[-1])
            masses.append(math.fsum(math.exp(min(value, 10.0)) for value in highest))
        factor = spreads[0] / spreads[1] if spreads[1] > 0 else math.nan
        # the k most likely of V tokens have at least k / V of the probability; logits are not bounded
        is_distribution = all(0.5 * PROBE_TOP / vocab_size <= mass <= 1.01 for mass in masses)
        modes: list[tuple[LogprobsMode, float]] = [("raw_logprobs", 1.0), ("processed_logprobs", PROBE_TEMPERATURE)]
        mode = next((mode for mode, exact in modes if abs(factor / exact - 1) < 0.2), None)
        if mode is None or not is_distribution:
            raise SamplerError(
                f"{self.url} returns neither raw nor processed logprobs: from temperature 1 to {PROBE_TEMPERATURE:g} "
                f"their spread shrinks {factor:.3g}-fold, and the {PROBE_TOP} most likely tokens have a total "
                f"probability of {masses[0]:.3g}. Start the server with --logprobs-mode processed_logprobs."
            )
        is_ours = base.get("owned_by") == OURS
        return Served(base["id"], str(base.get("root")), int(base["max_model_len"]), mode, is_ours)

    def models(self, *, is_first_contact: bool = False) -> list[dict[str, Any]]:
        """The base model and the loaded adapters."""
        response = self._call("/v1/models", None, CALL_TIMEOUT_S, tries=3 if is_first_contact else 6)
        cards: list[dict[str, Any]] = _parsed(response.content, self.url)["data"]
        return cards

    def has_model(self, name: str) -> bool:
        """Whether a request for `name` would be served."""
        return any(card["id"] == name for card in self.models())

    def load_adapter(self, name: str, directory: Path, *, timeout_s: float) -> str | None:
        """Load an adapter and verify that the server lists it; returns its version where the server says it.

        Args:
            name: that requests use for it.
            directory: with the PEFT files, on a file system that the server sees.
            timeout_s: of the call.

        Raises:
            SamplerError: the server did not load it; the message has the remedy.
        """
        version: str | None = None
        try:
            reply = self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)}, timeout_s)
            if reply.content.startswith(b"{"):  # vLLM answers with a sentence
                version = _parsed(reply.content, self.url).get("version")
        except RefusedError as error:
            if not self.has_model(name):  # it is listed if only the response of a first attempt was lost
                raise SamplerError(self._why_not_loaded(error, directory)) from None
        if not self.has_model(name):
            raise SamplerError(
                f"{self.url} accepted the adapter {name} but does not list it; it cannot be used for sampling"
            )
        return version

    def reload_weights(self, directory: Path, *, timeout_s: float) -> None:
        """Replace all weights of the served model; nothing that was computed with the old ones is used again.

        Args:
            directory: of a whole model, on a file system that the server sees.
            timeout_s: of the call.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self._call("/collective_rpc", body, timeout_s)
        self._call("/reset_prefix_cache", {}, CALL_TIMEOUT_S)

    def set_sleeping(self, is_sleeping: bool, *, timeout_s: float) -> None:
        """Let the server give its device's memory back, its weights waiting in host memory, or take it again.

        Args:
            is_sleeping: what it is to be; if it is so already, nothing happens.
            timeout_s: of the call.

        Raises:
            SamplerError: it is not so afterwards.
        """
        self._call("/sleep?level=1" if is_sleeping else "/wake_up", {}, timeout_s)
        reply = _parsed(self._call("/is_sleeping", None, CALL_TIMEOUT_S).content, self.url)
        if reply.get("is_sleeping") is not is_sleeping:
            raise SamplerError(f"{self.url} was told to {'sleep' if is_sleeping else 'wake up'} and says: {reply}")

    def unload_adapter(self, name: str, *, tries: int = 6) -> None:
        """Unload an adapter; one that is not loaded is no error."""
        try:
            self._call("/v1/unload_lora_adapter", {"lora_name": name}, CALL_TIMEOUT_S, tries=tries)
        except RefusedError as error:
            if error.status != 404:
                raise

    def post(self, path: str, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Post JSON and return the JSON object of the response; see `ask`."""
        return self.ask(path, body, timeout_s=timeout_s).body

    def ask(self, path: str, body: dict[str, Any], *, timeout_s: float) -> Answer:
        """Post JSON and return the JSON object of the response, with the version that gave it.

        Args:
            path: from the server's root.
            body: of the request.
            timeout_s: how long to wait for the response.
        """
        response = self._call(path, body, timeout_s)
        return Answer(_parsed(response.content, self.url), response.headers.get("x-adapter-version"))

    def _why_not_loaded(self, error: RefusedError, directory: Path) -> str:
        config = json.loads((directory / "adapter_config.json").read_text())
        rank = int(config["r"])
        if error.status == 404 and "No adapter found" not in error.message:
            return f"{self.url} does not load adapters at run time. Start it with:\n{self.command(rank)}"
        if "is greater than max_lora_rank" in error.message:
            return (
                f"{self.url} limits adapters to a lower rank than lora.rank {rank} ({error.message}). "
                f"Start it with --max-lora-rank {servable_rank(rank)}, or lower lora.rank."
            )
        if "lora" in error.message.lower() and "not enabled" in error.message.lower():
            return f"{self.url} was started without --enable-lora. Start it with:\n{self.command(rank)}"
        if error.status == 404:
            return f"{self.url} cannot read {directory}: it must see the same file system as the main rank ({error})"
        return f"the adapter cannot be served: {error}"

    def _call(self, path: str, body: dict[str, Any] | None, timeout_s: float, *, tries: int = 6) -> httpx.Response:
        """Request a path, by POST if there is a body; connection failures and busy servers are tried again."""
        url, method = self.url + path, "GET" if body is None else "POST"
        headers = {"Content-Type": "application/json"}
        key = next(filter(None, map(os.environ.get, API_KEYS)), None)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode("ascii")
        problem, attempt, deadline = "", 0, time.monotonic() + timeout_s
        while attempt < tries:
            if attempt > 0:
                self._pause(attempt)
            if self._place is not None and not accepts(self._place.socket):
                problem = "it does not run"
                attempt += 1
                continue
            try:
                response = self._http.request(method, url, content=data, headers=headers, timeout=timeout_s)
            except httpx.ReadTimeout:
                raise SamplerError(f"{url} did not answer within {timeout_s:g} s") from None
            except (httpx.RequestError, httpx.InvalidURL) as error:
                problem = str(error) or type(error).__name__
                attempt += 1
                continue
            if response.is_success:
                return response
            message = _message(response.content)
            if response.status_code == BUSY and time.monotonic() < deadline:  # it serves others too: wait for our turn
                time.sleep(_retry_after(response))
                continue
            is_dying = self._place is not None and response.status_code == 500
            if response.status_code not in UNAVAILABLE and not is_dying:
                raise RefusedError(url, response.status_code, message)
            problem = f"HTTP {response.status_code}: {message}"
            attempt += 1
        if self._place is not None:
            raise SamplerError(f"{self.url} failed {tries} times on one request, the last time with: {problem}")
        raise SamplerError(
            f"no server at {self.url} ({problem}; tried {tries} times). Start one, and wait until it answers:\n"
            f"{self.command()}\nor change the address in the recipe, or let the run start its own: rollout.sampler: "
            "vllm without vllm_url, or local; see docs/vllm.md."
        )

    def _pause(self, attempt: int) -> None:
        """Before a further attempt: until a supervised server is ready again, or for a while."""
        if self._place is None:
            time.sleep(PAUSES_S[attempt - 1])
        else:
            time.sleep(DYING_S)
            self._wait_ready()


def _retry_after(response: httpx.Response) -> float:
    given = response.headers.get("retry-after", "")
    return float(given) if given.isdecimal() else BUSY_S


def _parsed(body: bytes, url: str) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise SamplerError(f"{url} does not answer as a vLLM server: {body[:200].decode('utf-8', 'replace')!r}")
    return parsed


def _message(body: bytes) -> str:
    """The text of an error response, without vLLM's JSON and its worker's prefix."""
    try:
        text = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = body[:500].decode("utf-8", "replace")
    of_worker = re.search(r"Worker failed with error '(.*)', please check the stack trace", text, re.DOTALL)
    return of_worker.group(1) if of_worker else text
