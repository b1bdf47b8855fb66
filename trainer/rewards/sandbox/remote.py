r"""Runs code in a sandbox on another machine, by HTTP: a service, or your own containers behind a server.

    POST {"code": "...", "tests": [...], "input": "4\n", "timeout_s": 4.0, "memory_bytes": 536870912, "partial": false}
      ->  {"num_passed": 1, "has_ended": true, "printed": "8\n"}

The fields are those of `client.Sandbox.run` and `client.Ran`. docs/examples/sandbox_server.py is such a server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, final

from trainer.rewards.sandbox.client import Ran

if TYPE_CHECKING:
    import httpx

TRANSPORT_S: Final = 10.0
"""Time for the request beside that of the code."""
PAUSES_S: Final = (0.2, 0.5)
"""Before further attempts, where no connection was made or the server was busy."""


@final
@dataclass(frozen=True)
class RemoteSandbox:
    """In place of `client.Sandbox`."""

    url: str
    memory_bytes: int
    partial: bool = False

    def run(self, code: str, *, tests: Sequence[Mapping[str, Any]] = (), text: str = "", timeout_s: float) -> Ran:
        """Run the code, then each test in its names; see `client.Sandbox.run`.

        Raises:
            RuntimeError: the server does not answer, or not in this form: a failed reward, never 0.
        """
        body = {
            "code": code,
            "tests": [dict(test) for test in tests],
            "input": text,
            "timeout_s": timeout_s,
            "memory_bytes": self.memory_bytes,
            "partial": self.partial,
        }
        answer = self._post(body, timeout_s + TRANSPORT_S)
        try:
            ran = Ran(answer["num_passed"], answer["has_ended"], answer["printed"])
        except (KeyError, TypeError):
            raise RuntimeError(f"sandbox {self.url} answered {str(answer)[:200]}") from None
        is_count = isinstance(ran.num_passed, int) and not isinstance(ran.num_passed, bool)
        if not (is_count and 0 <= ran.num_passed <= len(tests) and isinstance(ran.has_ended, bool)):
            raise RuntimeError(f"sandbox {self.url} answered {str(answer)[:200]}")
        return ran

    def _post(self, body: Mapping[str, Any], timeout_s: float) -> Any:
        import httpx  # slow to import, and few recipes have a remote sandbox

        problem = ""
        for pause_s in (*PAUSES_S, None):
            try:
                response = _client().post(self.url, json=body, timeout=timeout_s)
                if response.is_success:
                    return response.json()
                problem = f"HTTP {response.status_code}: {response.text[:200]}"
                if response.status_code not in (429, 502, 503):
                    break
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem = f"{type(error).__name__}: {error}"
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                raise RuntimeError(f"sandbox {self.url}: {type(error).__name__}: {error}") from None
            if pause_s is not None:
                time.sleep(pause_s)
        raise RuntimeError(f"sandbox {self.url}: {problem}")


@cache
def _client() -> httpx.Client:
    """One client per worker process: loading the system's certificates takes longer than a request."""
    from trainer.http import direct_client

    return direct_client()
