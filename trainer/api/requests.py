"""Requests of a model, their results, and what the optimizer's parameters must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from trainer.api.protocol import ResultKind
from trainer.errors import UserError
from trainer.training.schedule import AdamParams


@final
@dataclass(frozen=True)
class Request:
    """A request that was accepted."""

    seq: int
    """Its place in the order of the model's requests; 0 creates the model."""
    kind: str
    body: bytes

    def parameters(self) -> dict[str, Any]:
        """The body as JSON."""
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


def answer(document: Mapping[str, Any]) -> tuple[ResultKind, bytes]:
    """A result in JSON."""
    return "json", json.dumps(document).encode()


def failure(message: str, category: str = "user") -> tuple[ResultKind, bytes]:
    """The result of a request that failed.

    Args:
        message: what is wrong, and the remedy.
        category: `user` or `server`: who must act.
    """
    return "error", json.dumps({"error": message, "category": category}).encode()


def adam_of(parameters: Mapping[str, Any]) -> AdamParams:
    """The optimizer's parameters of a request.

    Raises:
        UserError: another optimizer, or numbers that are none.
    """
    given = parameters.get("adam_params")
    if not isinstance(given, dict):
        other = (parameters.get("optimizer_params") or {}).get("type", "none")
        raise UserError(f"optimizer {other!r}: this server has AdamW; send adam_params")
    defaults = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
    values: dict[str, float] = {}
    for name, default in {**defaults, "grad_clip_norm": 0.0}.items():
        value = given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise UserError(f"adam_params.{name} = {value!r} is not a finite number")
        values[name] = float(value)
    if values["learning_rate"] < 0 or not 0 <= values["beta1"] < 1 or not 0 <= values["beta2"] < 1:
        raise UserError("adam_params: learning_rate is 0 or more, beta1 and beta2 are from 0 to below 1")
    clip = values.pop("grad_clip_norm")
    return AdamParams(
        values["learning_rate"],
        values["beta1"],
        values["beta2"],
        values["eps"],
        values["weight_decay"],
        clip if clip > 0 else None,
    )
