"""A vLLM server: the few calls it is asked for, and what it is."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final
from urllib.parse import urlsplit

from trainer.errors import TrainerError, UserError

PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between tries; a dropped connection is mended, a restarted server has lost the adapter."""
CALL_TIMEOUT_S: Final = 30.0
FIRST_TIMEOUT_S: Final = 300.0
"""A server that has just started compiles for its first request."""
UNAVAILABLE: Final = (502, 503, 504)
API_KEY: Final = "VLLM_API_KEY"
"""Environment variable of the server's --api-key, where it has one."""


LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
PROBE_TEMPERATURE: Final = 2.0
PROBE_TOP: Final = 5
UNTOUCHED: Final[dict[str, Any]] = {
    "ignore_eos": True,  # the recipe's stop tokens are sent; the server's own may be others
    "skip_special_tokens": False,  # stop strings may contain them
    "repetition_penalty": 1.0,  # a model's generation_config.json sets such defaults for requests that say nothing
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "return_token_ids": True,
}
"""Fields of every request: nothing but the model decides."""


@final
class SamplerError(UserError):
    """A sampling server that cannot be reached, or that cannot be trained with."""


@final
class RefusedError(TrainerError):
    """A server's own refusal of one request, for the caller to explain."""

    def __init__(self, where: str, status: int, message: str) -> None:
        """Keep status and message."""
        super().__init__(f"{where}: HTTP {status}: {message}")
        self.status, self.message = status, message


@final
@dataclass(frozen=True)
class Served:
    """What a server says and shows of itself."""

    base: str
    """Name of the base model."""
    root: str
    """Where the server read it."""
    max_model_tokens: int
    logprobs_mode: LogprobsMode
    """`raw_logprobs` are at temperature 1 always, `processed_logprobs` after temperature, top_p, top_k and min_p."""


@final
class VllmClient:
    """One vLLM server; requests may be made from several threads."""

    def __init__(self, url: str, *, model: str) -> None:
        """Remember the server; nothing is sent yet.

        Args:
            url: http or https, without path.
            model: that it should serve, for messages.
        """
        self.url, self.model = url.rstrip("/").removesuffix("/v1"), model
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise SamplerError(f"rollout.vllm_url must begin with http:// or https://, got {url!r}")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it stands in your own network

    def command(self, rank: int = 16) -> str:
        """What starts a server that can be trained with, at this address."""
        address = urlsplit(self.url)
        return (
            "  VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server "
            f"--model {self.model} --host {address.hostname} --port {address.port or 80} --dtype bfloat16 "
            f"--enable-lora --max-lora-rank {servable_rank(rank)} --logprobs-mode processed_logprobs "
            "--generation-config vllm"
        )

    def look(self, prompt: Sequence[int], vocab_size: int) -> Served:
        """Which model is served, and what its logprobs are of: one prompt at two temperatures.

        Args:
            prompt: any text, as tokens.
            vocab_size: of the model, roughly.

        Raises:
            SamplerError: no server, or one whose logprobs cannot be trained with.
        """
        base = next((card for card in self.models(is_first_contact=True) if card.get("parent") is None), None)
        if base is None:
            raise SamplerError(f"{self.url} serves no model")
        asked = {"model": base["id"], "prompt": prompt, "max_tokens": 1, "seed": 0, "logprobs": PROBE_TOP}
        spreads, masses = [], []
        for temperature in (1.0, PROBE_TEMPERATURE):
            body = {**UNTOUCHED, **asked, "temperature": temperature, "return_tokens_as_token_ids": True}
            answer = self.post("/v1/completions", body, timeout_s=FIRST_TIMEOUT_S)
            likeliest = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)[:PROBE_TOP]
            spreads.append(likeliest[0] - likeliest[-1])
            masses.append(math.fsum(math.exp(min(value, 10.0)) for value in likeliest))
        factor = spreads[0] / spreads[1] if spreads[1] > 0 else math.nan
        # the likeliest k of V tokens have at least k / V of the probability; logits have anything
        is_distribution = all(0.5 * PROBE_TOP / vocab_size <= mass <= 1.01 for mass in masses)
        modes: list[tuple[LogprobsMode, float]] = [("raw_logprobs", 1.0), ("processed_logprobs", PROBE_TEMPERATURE)]
        mode = next((mode for mode, exact in modes if abs(factor / exact - 1) < 0.2), None)
        if mode is None or not is_distribution:
            raise SamplerError(
                f"{self.url}: what it returns are neither raw nor processed logprobs: from temperature 1 to "
                f"{PROBE_TEMPERATURE:g} their spread shrinks {factor:.3g}-fold, and the likeliest {PROBE_TOP} have a "
                f"mass of {masses[0]:.3g}. Start the server with --logprobs-mode processed_logprobs."
            )
        return Served(base["id"], str(base.get("root")), int(base["max_model_len"]), mode)

    def models(self, *, is_first_contact: bool = False) -> list[dict[str, Any]]:
        """The base model and the adapters that are loaded."""
        answer = self._call("/v1/models", None, CALL_TIMEOUT_S, tries=3 if is_first_contact else 6)
        cards: list[dict[str, Any]] = _parsed(answer, self.url)["data"]
        return cards

    def has_model(self, name: str) -> bool:
        """Whether a request for `name` would be served."""
        return any(card["id"] == name for card in self.models())

    def load_adapter(self, name: str, directory: Path, *, timeout_s: float) -> None:
        """Load an adapter, and see it listed.

        Raises:
            SamplerError: it is not, with what to change.
        """
        try:
            self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)}, timeout_s)
        except RefusedError as error:
            if not self.has_model(name):  # it is, where the answer of a first try was lost
                raise SamplerError(self._why_not_loaded(error, directory)) from None
        if not self.has_model(name):
            raise SamplerError(f"{self.url} took the adapter {name} and does not list it; nothing can be published")

    def unload_adapter(self, name: str, *, tries: int = 6) -> None:
        """Unload an adapter; one that is not there is no error."""
        try:
            self._call("/v1/unload_lora_adapter", {"lora_name": name}, CALL_TIMEOUT_S, tries=tries)
        except RefusedError as error:
            if error.status != 404:
                raise

    def post(self, path: str, body: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Post JSON, get JSON."""
        return _parsed(self._call(path, body, timeout_s), self.url)

    def _why_not_loaded(self, error: RefusedError, directory: Path) -> str:
        config = json.loads((directory / "adapter_config.json").read_text())
        rank = int(config["r"])
        if error.status == 404 and "No adapter found" not in error.message:
            return f"{self.url} takes no adapters while it runs. Start it so:\n{self.command(rank)}"
        if "is greater than max_lora_rank" in error.message:
            return (
                f"{self.url} serves adapters of a lower rank than lora.rank {rank} ({error.message}). "
                f"Start it with --max-lora-rank {servable_rank(rank)}, or lower lora.rank."
            )
        if "lora" in error.message.lower() and "not enabled" in error.message.lower():
            return f"{self.url} was started without --enable-lora. Start it so:\n{self.command(rank)}"
        if error.status == 404:
            return f"{self.url} cannot read {directory}: it must see the same file system as the main rank ({error})"
        return f"the adapter cannot be served: {error}"

    def _call(self, path: str, body: dict[str, Any] | None, timeout_s: float, *, tries: int = 6) -> bytes:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        data = None if body is None else json.dumps(body).encode("ascii")
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        what = ""
        for attempt in range(tries):
            if attempt > 0:
                time.sleep(PAUSES_S[attempt - 1])
            try:
                with self._opener.open(request, timeout=timeout_s) as response:
                    answer: bytes = response.read()
                    return answer
            except urllib.error.HTTPError as error:
                with error:
                    message = _message(error.read())
                if error.code not in UNAVAILABLE:
                    raise RefusedError(f"{self.url}{path}", error.code, message) from None
                what = f"HTTP {error.code}: {message}"
            except TimeoutError:
                raise SamplerError(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                what = str(getattr(error, "reason", None) or error or type(error).__name__)
        raise SamplerError(
            f"no vLLM server at {self.url} ({what}; tried {tries} times). Start one, and wait until it answers:\n"
            f"{self.command()}\nor set rollout.vllm_url, or rollout.sampler to local; see docs/vllm.md."
        )


def servable_rank(rank: int) -> int:
    """The least value of --max-lora-rank that serves a rank.

    >>> servable_rank(4), servable_rank(16), servable_rank(40)
    (8, 16, 64)
    """
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def _parsed(answer: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SamplerError(f"{url} does not answer as a vLLM server: {answer[:200].decode('utf-8', 'replace')!r}")
    return found


def _message(answer: bytes) -> str:
    """The error's text, out of vLLM's JSON and the words of its workers."""
    try:
        text = str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = answer[:500].decode("utf-8", "replace")
    found = re.search(r"Worker failed with error '(.*)', please check the stack trace", text, re.DOTALL)
    return found.group(1) if found else text
