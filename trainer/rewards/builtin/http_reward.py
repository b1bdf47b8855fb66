"""Score completions on a reward server over HTTP.

The request is TRL's batch form as JSON, and so is the response:

    POST {"prompts": [...], "completions": ["..."], "columns": {"answer": [...]}}  ->  {"rewards": [1.0, null, ...]}

null abstains; any other value that is not a number fails its completion. docs/examples/reward_server.py is such a
server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from trainer.http import direct_client
from trainer.rewards.contract import UnscoredBatchError

MAX_RESPONSE_BYTES: Final = 64 << 20
MAX_MESSAGE_BYTES: Final = 500
FIRST_PAUSE_S: Final = 0.1


def http_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    url: str,
    post_timeout_s: float = 5.0,
    num_retries: int = 6,
    headers: dict[str, str] | None = None,
    **columns: Any,
) -> list[Any]:
    """Post a batch to `url` and return the rewards of the response.

    Failed connections, timeouts and the statuses 408, 429 and 5xx are retried after pauses of 0.1 s, 0.2 s and so on
    up to 3.2 s, so that a server may restart. All attempts together must fit into `reward_limits.timeout_s`. Proxies of
    the environment are not used: the server is expected in your own network.

    Args:
        prompts: text or messages of each prompt.
        completions: text of each completion, or a list with its one message.
        url: http or https.
        post_timeout_s: how long one attempt waits for the response.
        num_retries: attempts after the first.
        headers: added to each request, for instance a token.
        **columns: every other field of the rows, one list each.
    """
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    body = json.dumps({"prompts": list(prompts), "completions": texts, "columns": columns}).encode("ascii")
    if urlsplit(url).scheme not in ("http", "https"):
        raise UnscoredBatchError(f"url must begin with http:// or https://, got {url!r}")
    sent = httpx.Headers({"Content-Type": "application/json", **(headers or {})}, encoding="latin-1")
    response = _post(url, body, sent, timeout_s=post_timeout_s, num_retries=num_retries)
    rewards = response.get("rewards") if isinstance(response, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(texts):
        shown = json.dumps(response)[:200]
        raise UnscoredBatchError(f'{url} must answer {{"rewards": [{len(texts)} numbers or null]}}, not {shown}')
    return rewards


@cache
def _client() -> httpx.Client:
    """One client per worker process: loading the system's certificates takes longer than a request."""
    return direct_client()


def _post(url: str, body: bytes, headers: httpx.Headers, *, timeout_s: float, num_retries: int) -> Any:
    problem = ""
    for attempt in range(num_retries + 1):
        try:
            with _client().stream("POST", url, content=body, headers=headers, timeout=timeout_s) as response:
                if response.is_success:
                    return json.loads(_first_bytes(response, MAX_RESPONSE_BYTES))
                message = _first_bytes(response, MAX_MESSAGE_BYTES).decode("utf-8", "replace")
            problem = f"HTTP {response.status_code}: {message}"
            if response.status_code not in (408, 429) and response.status_code < 500:
                raise UnscoredBatchError(f"{url}: {problem}")
        except (httpx.RequestError, httpx.InvalidURL) as error:
            problem = f"{type(error).__name__}: {error}"
        except ValueError as error:
            raise UnscoredBatchError(f"{url} did not answer with JSON: {error}") from None
        if attempt < num_retries:
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise UnscoredBatchError(f"{url}: {problem} (tried {num_retries + 1} times)")


def _first_bytes(response: httpx.Response, limit: int) -> bytes:
    """The body up to `limit` bytes; the rest is not read."""
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) >= limit:
            break
    return bytes(body[:limit])
