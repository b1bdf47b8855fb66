"""What the gateway needs of an engine: the embedded one or vLLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from trainer.engine.protocol import Sampling
from trainer.serve.engine_client import End, Token


class Engine(Protocol):
    """Continues token sequences and loads adapters."""

    @property
    def hello(self) -> dict[str, Any]:
        """`window`, the most tokens of a sequence, and `vocab`, the size of the vocabulary."""

    @property
    def is_ready(self) -> bool:
        """Whether it answers."""

    @property
    def num_live(self) -> int:
        """Sequences in flight."""

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """`load`, `unload` or `stats`; the reply has `ok` and, where it is false, `error`."""

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        """Yield the tokens of a sequence, then its end; closing the iterator cancels it."""


class EngineOwner(Protocol):
    """The process of an engine, kept running."""

    @property
    def client(self) -> Engine:
        """Speaks to it."""

    def launch(self) -> None:
        """Begin to start it."""

    async def start(self, adapters: Callable[[], dict[str, str]]) -> None:
        """Wait until it is ready and has the adapters, name and path; from then on it is started again."""

    async def stop(self) -> None:
        """End it."""
