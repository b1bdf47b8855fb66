"""A client of `/api/v1` in plain HTTP: what the tinker client sends, one request at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import numpy as np

from trainer.api.datum import Datum
from trainer.api.wire import FLOAT32, INTEGER64, message_class

PROTOBUF: Final = {"Content-Type": "application/x-protobuf"}
ADAM: Final = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
PATIENCE_S: Final = 120.0
ROWS: Final = (9, 17, 5)
"""Lengths of the data of a step."""


def step_data(step: int, vocab: int = 320, lengths: Sequence[int] = ROWS) -> list[Datum]:
    """The data of a step: the same rows each third step, so that losses fall."""
    random = np.random.default_rng(step % 3)
    rows = [random.integers(3, vocab, size=length + 1).tolist() for length in lengths]
    return [Datum.shifted(row, weights=np.ones(len(row))) for row in rows]


def pass_body(model: str, seq: int, data: Sequence[Datum], loss: str, *, forward_only: bool = False) -> bytes:
    """A forward_backward request in protobuf."""
    message = message_class("PassRequest")(model_id=model, seq_id=seq, loss_fn=loss, forward_only=forward_only)
    for datum in data:
        added = message.data.add()
        added.input.add().text.tokens = np.asarray(datum.tokens, np.int32).tobytes()
        for name, values in datum.inputs.items():
            tensor = added.inputs.add(key=name).value
            tensor.dtype = INTEGER64 if values.dtype == np.int64 else FLOAT32
            tensor.dense, tensor.shape[:] = values.tobytes(), values.shape
    return message.SerializeToString()


OPEN: Final[list[httpx.Client]] = []
"""Connections, which a fixture closes after each test."""


@dataclass
class RawModel:
    """A model of a session; its requests are numbered."""

    client: RawClient
    name: str
    seq: int = 0
    sent: list[tuple[str, Any]] = field(default_factory=list)

    def next(self) -> int:
        self.seq += 1
        return self.seq

    def post(self, route: str, **fields: Any) -> str:
        """Send a numbered request in JSON; returns its id."""
        body = {"model_id": self.name, "seq_id": self.next(), **fields}
        self.sent.append((route, body))
        return self.client.post(route, body)["request_id"]

    def forward_backward(
        self, data: Sequence[Datum], loss: str = "cross_entropy", *, forward_only: bool = False
    ) -> str:
        body = pass_body(self.name, self.next(), data, loss, forward_only=forward_only)
        self.sent.append(("forward_backward", body))
        return self.client.post("forward_backward", body)["request_id"]

    def optim_step(self, **changes: float) -> str:
        return self.post("optim_step", adam_params={**ADAM, **changes})

    def train(self, step: int) -> float:
        """One step; returns the loss."""
        request, update = self.forward_backward(step_data(step)), self.optim_step()
        loss = self.client.passed(request)["loss:sum"]
        self.client.result(update)
        return loss


@dataclass
class RawClient:
    """A session."""

    url: str
    key: str = "tml-none"
    session: str = ""
    models: int = 0

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=f"{self.url}/api/v1", headers={"X-API-Key": self.key}, timeout=60)
        OPEN.append(self.http)

    def send(self, route: str, body: Mapping[str, Any] | bytes, method: str = "POST") -> httpx.Response:
        """Send once, whatever the answer."""
        content = {"content": body, "headers": PROTOBUF} if isinstance(body, bytes) else {"json": body}
        return self.http.request(method, route, **({} if method == "GET" else content))

    def post(self, route: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """Send until the server answers."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                response = self.send(route, body)
                if response.status_code < 500:
                    assert response.status_code == 200, response.text
                    return response.json()
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def fetch(self, request: str) -> httpx.Response:
        """The result of a request, once it is there."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                response = self.send("retrieve_future", {"request_id": request})
                if response.status_code != 408 and response.status_code < 500:
                    return response
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"no result of {request}")

    def result(self, request: str) -> dict[str, Any]:
        response = self.fetch(request)
        assert response.status_code == 200, response.text
        return response.json()

    def output(self, request: str) -> Any:
        """The result of a pass, as protobuf."""
        response = self.fetch(request)
        assert response.headers["content-type"] == PROTOBUF["Content-Type"], response.text
        message = message_class("PassResult")()
        message.ParseFromString(response.content)
        return message

    def passed(self, request: str) -> dict[str, float]:
        """Metrics of a pass."""
        return {entry.key: entry.value for entry in self.output(request).metrics}

    def logprobs(self, request: str) -> list[np.ndarray]:
        """[T] of each datum."""
        fields = {entry.key: entry.value for entry in self.output(request).outputs[0].fields}["logprobs"]
        offsets = np.frombuffer(fields.offsets, np.int64) // 4
        return np.split(np.frombuffer(fields.data, np.float32), offsets[1:-1])

    def open(self) -> RawClient:
        """Begin the session."""
        self.session = self.post("create_session", {"tags": [], "sdk_version": "0.38.0"})["session_id"]
        return self

    def create(self, rank: int = 4, seed: int = 1, base: str = "model", **lora: Any) -> RawModel:
        """A new model."""
        self.models += 1
        body = {
            "session_id": self.session, "model_seq_id": self.models - 1, "base_model": base,
            "lora_config": {"rank": rank, "seed": seed, **lora},
        }  # fmt: skip
        request = self.post("create_model", body)["request_id"]
        return RawModel(self, self.result(request)["model_id"])

    def create_from(self, path: str, *, optimizer: bool = True) -> RawModel:
        """A model that continues from a state."""
        self.models += 1
        body = {"session_id": self.session, "model_seq_id": self.models - 1, "path": path, "optimizer": optimizer}
        return RawModel(self, self.result(self.post("load_weights", body)["request_id"])["model_id"])
