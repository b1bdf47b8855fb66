"""Score completions on a reward server over HTTP.

The request is TRL's batch form as JSON, and so is the response:

    POST {"prompts": [...], "completions": ["..."], "columns": {"answer": [...]}, "groups": [8, 8]}
      ->  {"rewards": [1.0, null, ...]}

null abstains; any other value that is not a number fails its completion. `groups` says how many completions in a row
are of one prompt. docs/examples/reward_server.py is such a server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Final, final

from trainer.config.judge_settings import HTTPRewardSettings
from trainer.rewards.call_result import CallResult
from trainer.rewards.judges.caller import Caller
from trainer.rewards.judges.endpoint import Endpoint, RefusedError
from trainer.rewards.judges.protocol import Item, PendingResults, Surroundings
from trainer.rewards.judges.threads import Threads

RESERVED: Final = ("prompt", "prompts", "completion", "completions")


@final
class HTTPReward:
    """Posts all completions that are submitted together in one request."""

    def __init__(self, name: str, settings: HTTPRewardSettings, around: Surroundings) -> None:
        """Nothing is posted yet.

        Args:
            name: of the reward.
            settings: arguments of the recipe.
            around: the run.

        Raises:
            RewardError: the environment variable of the key is not set.
        """
        self._settings = settings
        self._endpoint = Endpoint(name, settings.url, settings, settings.post_timeout_s, around)
        self._threads = Threads(1, f"judge-{name}")
        self._caller = Caller(self._endpoint, around, self._threads)

    def submit(self, items: Sequence[Item], sizes: Sequence[int]) -> Sequence[PendingResults]:
        """Start to post; see `Judge`."""
        return [self._caller.submit(lambda: self._post(items, sizes), items)] if items else []

    def close(self) -> None:
        """End every wait; a request that was sent ends by its time limit, and nobody waits for it."""
        self._endpoint.close()
        self._threads.cancel()

    def _post(self, items: Sequence[Item], sizes: Sequence[int]) -> list[CallResult]:
        rows = [row for _, row in items]
        names = dict.fromkeys(name for row in rows for name in row if name not in RESERVED)
        body = {
            "prompts": [row.get("messages", row.get("prompt", "")) for row in rows],
            "completions": [text for text, _ in items],
            "columns": {name: [row.get(name) for row in rows] for name in names},
            "groups": list(sizes),
        }
        answer = self._endpoint.post(body, self._settings.headers)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(items):
            shown = json.dumps(answer)[:200]
            raise RefusedError(
                f'{self._settings.url} must answer {{"rewards": [{len(items)} numbers or null]}}, not {shown}'
            )
        return [_result(value, item) for value, item in zip(rewards, items, strict=True)]


def _result(value: object, item: Item) -> CallResult:
    if value is None:
        return CallResult()
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return CallResult(number)
    return CallResult(failure=f"on {item[1]}\nthe server answered {value!r:.200}, which is no finite number")
