"""Ask a reward server over HTTP.

The request is TRL's batch form as JSON, and so is the answer:

    POST {"prompts": [...], "completions": ["..."], "columns": {"answer": [...]}}  ->  {"rewards": [1.0, null, ...]}

null abstains; anything else than a number fails for its completion. docs/examples/reward_server.py is such a server.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Final

from trainer.rewards.contract import UnscoredBatchError

MAX_RESPONSE_BYTES: Final = 64 << 20
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
    """Post a batch to `url` and return the rewards of the answer.

    Tried again, with pauses of 0.1 s, 0.2 s and so on to 3.2 s, so that a server may restart: no connection, no answer
    in time, and statuses 408, 429 and 5xx. All tries together must fit into `reward_limits.timeout_s`. Proxies of the
    environment are not used: a reward server stands in your own network.

    Args:
        prompts: text or messages of each prompt.
        completions: text, or a list of one message, of each completion.
        url: where to post; http or https.
        post_timeout_s: how long to wait for the answer to one try.
        num_retries: tries after the first.
        headers: added to each request, for instance a token.
        **columns: every other field of the rows, a list each.
    """
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    body = json.dumps({"prompts": list(prompts), "completions": texts, "columns": columns}).encode("ascii")
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data=body, headers=sent, method="POST")
    if request.type not in ("http", "https"):
        raise UnscoredBatchError(f"url must begin with http:// or https://, got {url!r}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer = _post(opener, request, post_timeout_s, num_retries)
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(texts):
        shown = json.dumps(answer)[:200]
        raise UnscoredBatchError(f'{url} must answer {{"rewards": [{len(texts)} numbers or null]}}, not {shown}')
    return rewards


def _post(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float, retries: int
) -> Any:
    for attempt in range(retries + 1):
        try:
            with opener.open(request, timeout=timeout_s) as response:
                return json.loads(response.read(MAX_RESPONSE_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                what = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
            if error.code not in (408, 429) and error.code < 500:
                raise UnscoredBatchError(f"{request.full_url}: {what}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            what = f"{type(error).__name__}: {error}"
        except ValueError as error:
            raise UnscoredBatchError(f"{request.full_url} did not answer with JSON: {error}") from None
        if attempt < retries:
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise UnscoredBatchError(f"{request.full_url}: {what} (tried {retries + 1} times)")
