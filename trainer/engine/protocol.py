"""What the gateway and the engine say to each other. No torch.

One JSON object a line, over a Unix socket, or over TCP after a handshake (`handshake.py`). The gateway sends requests:

    {"op": "generate", "id": "a1", "prompt": [1, 40], "adapter": "sums", "sampling": {...}}
    {"op": "cancel", "id": "a1"}
    {"op": "load", "id": "b1", "name": "sums", "path": "runs/sums/adapter"}     the same name again replaces it
    {"op": "unload", "id": "b2", "name": "sums"}
    {"op": "stats", "id": "b3"}
    {"op": "ping", "id": "b4"}                          answered beside the steps

The engine sends a line for each step, and one for each request that ends or is answered:

    {"tokens": [["a1", 19, null], ["a2", 7, {"logprob": -0.5, "top": [[7, -0.5]]}]]}
    {"tokens": [["a3", 4, null]], "began": {"a3": [0.2, 0.05]}}       with a first token: seconds of waiting and of its prompt
    {"end": "a1", "reason": "stop", "prompt_tokens": 2, "cached_tokens": 0, "version": "sums@3f2a"}
    {"reply": "b1", "ok": true, ...} or {"reply": "b1", "ok": false, "error": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeAlias, final

EndReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]
LINE_LIMIT: Final = 1 << 26
"""Bytes of the longest line: a prompt of some million tokens."""


@final
@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are drawn, and what ends it."""

    max_tokens: int
    seed: int
    """Of the noise; equal seeds give equal tokens."""
    sample: int = 0
    """Index among the sequences of one request (`n`); selects the noise."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the sequence; the last one is reported."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """Likeliest alternatives reported with each token; None reports no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: str | None = None
    """A grammar of llguidance that the text follows."""
    first_position: int = 0
    """Noise position of the first token: above 0 where a broken stream is continued."""

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> Sampling:
        """Read it from a message."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in raw.items() if name in known}
        values["stop_ids"] = tuple(values.get("stop_ids", ()))
        values["logit_bias"] = tuple((int(token), float(bias)) for token, bias in values.get("logit_bias", ()))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the default."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


def line(message: Mapping[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
