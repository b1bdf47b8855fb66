"""Calls a judge and turns what goes wrong into results."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, final

from trainer.errors import TrainerError
from trainer.rewards.call_result import CallResult
from trainer.rewards.judges.endpoint import Endpoint, OutageError
from trainer.rewards.judges.protocol import Item, Surroundings
from trainer.rewards.judges.threads import Call, Threads

MAX_FAILURE_CHARACTERS: Final = 8000


@final
@dataclass(frozen=True)
class Caller:
    """Calls a judge and turns what goes wrong into results."""

    endpoint: Endpoint
    around: Surroundings
    threads: Threads

    def submit(self, ask: Call, items: Sequence[Item]) -> Future[list[CallResult]]:
        """Ask in a thread; an outage leads to what the recipe says, any other error is a failure of the items.

        Where the run is to stop, the result is the error that `keep_waiting` raised.

        Args:
            ask: asks for the results of all items.
            items: that they are for.
        """
        return self.threads.submit(lambda: self._call(ask, items))

    def _call(self, ask: Call, items: Sequence[Item]) -> list[CallResult]:
        try:
            return ask()
        except TrainerError:
            raise
        except OutageError as error:
            self.around.costs.add(unscored=len(items))
            if self.endpoint.on_outage == "abstain":
                return [CallResult() for _ in items]
            return [CallResult(failure=f"on {row}\nthe judge does not answer: {error}") for _, row in items]
        except Exception as error:
            problem = "".join(traceback.format_exception_only(error)).strip()
            return [CallResult(failure=f"on {row}\n{problem[:MAX_FAILURE_CHARACTERS]}") for _, row in items]


def split_groups(items: Sequence[Item], sizes: Sequence[int]) -> list[Sequence[Item]]:
    """The items of each group.

    >>> split_groups([("a", {}), ("b", {}), ("c", {})], [2, 1])
    [[('a', {}), ('b', {})], [('c', {})]]
    """
    groups, begin = [], 0
    for size in sizes:
        groups.append(items[begin : begin + size])
        begin += size
    return groups
