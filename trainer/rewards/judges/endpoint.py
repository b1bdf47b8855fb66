"""Posts JSON to a judge's server: attempts, pauses, and what an outage leads to."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, Final, final

import httpx

from trainer.config.judge_settings import ServerSettings
from trainer.errors import RewardError
from trainer.http import direct_client
from trainer.retry import growing_pauses, retry
from trainer.rewards.judges.circuit import Circuit
from trainer.rewards.judges.protocol import Surroundings

MAX_RESPONSE_BYTES: Final = 64 << 20
SHOWN_BYTES: Final = 500
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 10.0
LONGEST_RETRY_AFTER_S: Final = 60.0
POLL_S: Final = 0.1


class OutageError(Exception):
    """The server does not answer, so that no completion is at fault."""


class RefusedError(Exception):
    """The server answered that the request is wrong, or with something that is not JSON."""

    def __init__(self, problem: str, status: int = 200) -> None:
        """Keep the status."""
        super().__init__(problem)
        self.status = status


class _TransientError(Exception):
    """An attempt that may succeed later."""

    def __init__(self, problem: str, *, hangs: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(problem)
        self.hangs, self.retry_after_s = hangs, retry_after_s


class _OpenError(Exception):
    """The circuit was opened by another request."""


@final
class Endpoint:
    """One server; threads share it."""

    def __init__(self, name: str, url: str, settings: ServerSettings, deadline_s: float, around: Surroundings) -> None:
        """Nothing is sent yet.

        Args:
            name: of the reward, for messages.
            url: to post to.
            settings: attempts and outages.
            deadline_s: seconds that an attempt may take in all.
            around: the run.

        Raises:
            RewardError: the environment variable of the key is not set.
        """
        self.name, self.url, self._settings, self._deadline_s = name, url, settings, deadline_s
        self._around, self._circuit = around, Circuit()
        self._closed = threading.Event()
        self._headers = {"Content-Type": "application/json"}
        if settings.api_key_env is not None:
            key = os.environ.get(settings.api_key_env)
            if not key:
                raise RewardError(f"reward {name}: the environment variable {settings.api_key_env} is not set")
            self._headers["Authorization"] = f"Bearer {key}"

    @property
    def on_outage(self) -> str:
        """What an outage leads to here: `wait`, `fail` or `abstain`."""
        is_impatient = self._settings.on_outage == "wait" and not self._around.may_wait
        return "fail" if is_impatient else self._settings.on_outage

    def close(self) -> None:
        """End every wait; requests that are sent end by their deadline."""
        self._closed.set()

    def post(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        """Send JSON; returns the JSON of the answer.

        Raises:
            OutageError: the server did not answer, within `max_wait_s` where it is waited for.
            RefusedError: the server refused this request.
        """
        data = json.dumps(body).encode("ascii")
        sent = httpx.Headers({**self._headers, **(headers or {})}, encoding="latin-1")
        began = time.monotonic()
        while True:
            state = self._circuit.enter()
            with suppress(_TransientError, _OpenError):
                if state == "closed":
                    return self._attempts(data, sent)
                if state == "probe":
                    return self._attempt(data, sent, time.monotonic())
            if self._circuit.is_open:
                self._await(began)

    def _await(self, began: float) -> None:
        """Wait a moment for a server that is down.

        Raises:
            OutageError: it is not to be waited for, or no longer.
        """
        limit_s = self._settings.max_wait_s
        waited_s = time.monotonic() - began
        if self.on_outage != "wait" or (limit_s is not None and waited_s > limit_s):
            waited = f"; waited {waited_s:.0f} s (max_wait_s)" if self.on_outage == "wait" else ""
            raise OutageError(f"{self.url}: {self._circuit.problem}{waited}")
        self._pause(POLL_S)

    def _pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            OutageError: the rewards are being closed.
        """
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            if self._closed.wait(min(rest, POLL_S)):
                raise OutageError(f"{self.url}: closed while waiting ({self._circuit.problem})")
            self._around.keep_waiting()

    def _attempts(self, data: bytes, headers: httpx.Headers) -> Any:
        """Try several times, while the circuit is closed.

        Raises:
            RefusedError: also where the server answers others, but not this request.
        """
        began = time.monotonic()
        limits = {True: min(1, self._settings.num_retries), False: self._settings.num_retries}
        num_failed = Counter[bool]()

        def attempt() -> Any:
            if self._circuit.is_open:
                raise _OpenError
            return self._attempt(data, headers, began)

        def may_repeat(error: Exception) -> bool:
            if not isinstance(error, _TransientError) or self._circuit.is_open:
                return False
            num_failed[error.hangs] += 1
            is_last = num_failed[error.hangs] > limits[error.hangs]
            self._around.costs.add(retries=int(not is_last))
            return not is_last

        def asked_pause_s(error: Exception) -> float:
            return error.retry_after_s if isinstance(error, _TransientError) else 0.0

        try:
            return retry(
                attempt,
                pauses_s=growing_pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S, self._settings.num_retries),
                is_transient=may_repeat,
                least_pause_s=asked_pause_s,
                sleep=self._pause,
            )
        except _TransientError as error:
            if self._circuit.is_open:
                raise
            if self._circuit.answered_since(began):
                problem = f"{error} (tried {num_failed.total()} times; the server answered others meanwhile)"
                raise RefusedError(f"{self.url}: {problem}") from None
            is_new = self._circuit.failed(began, str(error), is_down=True, least_pause_s=error.retry_after_s)
            self._opened(is_new=is_new)
            raise

    def _attempt(self, data: bytes, headers: httpx.Headers, began: float) -> Any:
        """One attempt of a request that began then, which tells whether the server answers."""
        try:
            answer = self._send(data, headers, time.monotonic() + self._deadline_s)
        except _TransientError as error:
            is_new = self._circuit.failed(began, str(error), is_down=error.hangs, least_pause_s=error.retry_after_s)
            self._opened(is_new=is_new)
            raise
        except RefusedError:
            self._answered()
            raise
        except BaseException:
            self._circuit.release()
            raise
        self._answered()
        self._around.costs.add(calls=1)
        return answer

    def _answered(self) -> None:
        was_down_s = self._circuit.succeeded()
        if was_down_s:
            self._around.costs.add(outage_s=was_down_s)
            self._around.say(f"reward {self.name}: the server answers again, after {was_down_s:.0f} s")

    def _opened(self, *, is_new: bool) -> None:
        if not is_new:
            return
        limit_s = self._settings.max_wait_s
        limit = f" up to {limit_s:g} s" if limit_s is not None else ""
        then = {"wait": f"waiting for it{limit}", "fail": "its completions fail", "abstain": "it abstains"}
        self._around.say(
            f"warning: reward {self.name}: {self.url} does not answer ({self._circuit.problem}); {then[self.on_outage]}"
        )

    def _send(self, data: bytes, headers: httpx.Headers, deadline: float) -> Any:
        """One request and its answer.

        Raises:
            _TransientError: it may succeed later.
            RefusedError: it would not.
        """
        try:
            with self._client.stream(
                "POST", self.url, content=data, headers=headers, timeout=max(0.001, deadline - time.monotonic())
            ) as response:
                body = _first_bytes(response, MAX_RESPONSE_BYTES if response.is_success else SHOWN_BYTES, deadline)
        except httpx.TimeoutException as error:
            raise _TransientError(
                f"{type(error).__name__}: no answer within {self._deadline_s:g} s", hangs=True
            ) from None
        except httpx.RequestError as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from None
        if response.is_success:
            try:
                return json.loads(body)
            except ValueError as error:
                raise RefusedError(f"{self.url} did not answer with JSON: {error}") from None
        problem = f"HTTP {response.status_code}: {body.decode('utf-8', 'replace')}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _TransientError(problem, retry_after_s=_retry_after_s(response.headers.get("Retry-After")))
        raise RefusedError(f"{self.url}: {problem}", response.status_code)

    @cached_property
    def _client(self) -> httpx.Client:
        """One client per server: loading the system's certificates takes longer than a request."""
        return direct_client(use_proxies=self._settings.use_proxies)


def _first_bytes(response: httpx.Response, limit: int, deadline: float) -> bytes:
    """The body up to `limit` bytes; the rest is not read.

    Raises:
        ReadTimeout: the deadline passed, though bytes kept coming.
    """
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) >= limit:
            break
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the answer did not end")
    return bytes(body[:limit])


def _retry_after_s(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, a minute at most; 0 where it says nothing.

    >>> _retry_after_s("2"), _retry_after_s("3600"), _retry_after_s(None), _retry_after_s("soon")
    (2.0, 60.0, 0.0, 0.0)
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S) if seconds == seconds else 0.0
