"""A model behind a server of OpenAI's API, for `trainer chat`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import httpx

from trainer.errors import DataError, UserError
from trainer.http import direct_client
from trainer.inference.chat_model import Draw
from trainer.types import Completion, FinishReason

TIMEOUT_S: Final = 600.0
KEY_VARIABLE: Final = "OPENAI_API_KEY"


@final
@dataclass(frozen=True)
class ServerSource:
    """What people call it."""

    label: str


def is_address(target: str) -> bool:
    """Whether a name on the command line is the address of a server."""
    return target.startswith(("http://", "https://"))


@final
class ServerModel:
    """Answers chats by requests to a server."""

    def __init__(self, target: str) -> None:
        """Choose a model of a server.

        Args:
            target: `http://HOST:PORT/v1`, with `#NAME` for one of its models; otherwise its last one, which is the
                adapter where `trainer serve` serves one run.

        Raises:
            UserError: the server does not answer, or has no such model.
        """
        address, _, name = target.partition("#")
        self._address = address.rstrip("/")
        key = os.environ.get(KEY_VARIABLE, "none")
        self._client = direct_client()
        self._client.headers["Authorization"] = f"Bearer {key}"
        names = [str(each["id"]) for each in self._ask("GET", "/models")["data"]]
        if name and name not in names:
            raise UserError(f"{address}: has no model {name!r}; there are: {', '.join(names)}")
        self._model = name or names[-1]
        self.source = ServerSource(self._model)

    def reply(
        self, messages: Sequence[Mapping[str, Any]], draw: Draw, on_text: Callable[[str], None] | None = None
    ) -> Completion:
        """Answer one chat.

        Args:
            messages: ends with a user turn.
            draw: how.
            on_text: called with the text when the server has finished it.

        Raises:
            DataError: the server refuses the chat.
        """
        body = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": draw.max_tokens,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "seed": draw.seed,
        }
        choice = self._ask("POST", "/chat/completions", body)["choices"][0]
        reason: FinishReason = "length" if choice["finish_reason"] == "length" else "stop"
        text = choice["message"]["content"] or ""
        if on_text is not None:
            on_text(text)
        return Completion((), (), reason, 0, text)

    def _ask(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, self._address + route, json=body, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise UserError(f"{self._address}: does not answer: {error}. Start it: trainer serve RUN") from None
        if response.status_code == 200:
            document: dict[str, Any] = response.json()
            return document
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]
        if response.status_code == 401:
            message += f" (the key is taken from {KEY_VARIABLE})"
        kind = DataError if response.status_code == 400 else UserError
        raise kind(f"{self._address}{route}: {message}")
