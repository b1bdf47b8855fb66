"""The state behind the routes of the training API: executor, sampling, guard; and what requests become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any, Final, final

from transformers import PreTrainedTokenizerBase

from trainer.api.protocol import request_id
from trainer.api.wire import read_pass_head
from trainer.errors import DataError
from trainer.serve.api_errors import ApiError
from trainer.serve.gateway import Gateway
from trainer.serve.training.executor_client import ExecutorClient
from trainer.serve.training.guard import TrainingGuard
from trainer.serve.training.samples import SampleBody, Samples, draws_of

CLIENT_VERSION: Final = "0.38."
"""Beginning of the versions of the tinker client that this server is tested with."""
MAX_BODY: Final = 1 << 26
"""Bytes of a request, decompressed."""
NO_HEAD: Final = (
    "train_unembed: this server trains no adapter on the LM head; models are created without it, whatever the request "
    "says"
)


@final
@dataclass
class TrainingFront:
    """What the routes share."""

    gateway: Gateway
    executor: ExecutorClient
    guard: TrainingGuard
    samples: Samples
    model_path: str
    """Directory of the base model, where clients on this machine find its tokenizer."""
    _samplers: dict[str, str | None] = field(default_factory=dict)
    """Directory by sampling session and account; None is the base."""

    @classmethod
    def of(cls, gateway: Gateway, executor: ExecutorClient, guard: TrainingGuard, model_path: str) -> TrainingFront:
        """In front of the gateway's engine."""
        tokenizer: PreTrainedTokenizerBase = gateway.models.base.tokenizer
        return cls(gateway, executor, guard, Samples(gateway, tokenizer), model_path)

    @property
    def model_name(self) -> str:
        """Name of the base model."""
        return self.gateway.models.base.name

    def check_base(self, name: str | None) -> None:
        """Refuse another base model.

        Raises:
            ApiError: the name is not that of this server's base.
        """
        if name is not None and name not in {self.model_name, self.model_path}:
            raise ApiError(404, f"no base model {name!r}; this server has {self.model_name!r}", param="base_model")

    def config(self) -> dict[str, Any]:
        """Flags of the client."""
        return {
            "pjwt_auth_enabled": False,
            "credential_default_source": "api_key",
            "parallel_fwdbwd_chunks": True,
            "proto_compress_fwdbwd": find_spec("zstandard") is not None,
            "sample_use_retrieve_futures": False,
            "custom_loss_server_side": False,
            "sample_join_sampling_session": False,
        }

    async def create_session(self, owner: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A new session, with what the client should be told about this server."""
        about = {name: body.get(name) for name in ("tags", "user_metadata", "sdk_version", "display_name")}
        reply, _ = await self.executor.ask("session", owner=owner, about=about)
        version = str(body.get("sdk_version") or "none")
        warnings = [NO_HEAD]
        if not version.startswith(CLIENT_VERSION):
            warnings.append(f"tinker {version}: this server was tested with {CLIENT_VERSION}*; the protocol may differ")
        return {
            "type": "create_session", "session_id": reply["session"], "warning_message": "; ".join(warnings),
        }  # fmt: skip

    async def create_model(self, owner: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Accept the creation of a model.

        Raises:
            ApiError: another base, optimizer or adapter than this server has.
        """
        self.check_base(body["base_model"])
        _check_optimizer(body.get("optimizer_config"))
        lora = body.get("lora_config")
        if lora is None:
            raise ApiError(400, "no lora_config: this server trains adapters only", param="lora_config")
        return await self._create(owner, body, lora, None)

    async def _create(
        self, owner: str, body: Mapping[str, Any], lora: Mapping[str, Any], begin: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        most = await self.guard.most_models(owner)
        reply, _ = await self.executor.ask(
            "create",
            most_models=most,
            owner=owner,
            session=body["session_id"],
            number=int(body["model_seq_id"]),
            lora=lora,
            begin=begin,
            user_metadata=body.get("user_metadata"),
        )
        return {"request_id": reply["request"], "model_id": reply["request"].rpartition("/")[0]}

    async def load_weights(self, owner: str, body: Mapping[str, Any], raw: bytes) -> dict[str, Any]:
        """Continue from a state: in a new model, or in one that there is."""
        if body.get("weights_access_token") is not None:
            raise ApiError(400, "weights_access_token is not supported by this server", param="weights_access_token")
        if body.get("session_id") is None:
            return await self.submit(owner, "load", body, raw)
        self.check_base(body.get("base_model"))
        _check_optimizer(body.get("optimizer_config"))
        begin = {"path": body["path"], "optimizer": bool(body["optimizer"])}
        return await self._create(owner, body, {}, begin)

    async def submit(self, owner: str, kind: str, body: Mapping[str, Any], raw: bytes) -> dict[str, Any]:
        """Accept a request of a model's order."""
        return (await self._submit(owner, kind, body, raw))[0]

    async def _submit(self, owner: str, kind: str, body: Mapping[str, Any], raw: bytes) -> tuple[dict[str, Any], bool]:
        """`submit`, and whether the request came for the first time."""
        model, seq = str(body["model_id"]), body.get("seq_id")
        if isinstance(seq, bool) or not isinstance(seq, int):
            raise ApiError(400, f"seq_id {seq!r}: requests of a model are numbered from 1", param="seq_id")
        most = await self.guard.most_models(owner)
        reply, _ = await self.executor.ask(
            "submit", raw, owner=owner, model=model, seq=seq, kind=kind, most_models=most
        )
        found = {"request_id": request_id(model, seq), "model_id": model}
        return found, bool(reply["is_new"])

    async def submit_pass(self, owner: str, raw: bytes) -> dict[str, Any]:
        """Accept a forward or forward_backward request; what is wrong with its data is the request's result."""
        try:
            model, seq = read_pass_head(raw)
        except DataError as error:
            raise ApiError(400, str(error)) from None
        ticket = await self.guard.admit_pass(owner, raw)
        is_new = False
        try:
            found, is_new = await self._submit(owner, "pass", {"model_id": model, "seq_id": seq}, raw)
        finally:
            ticket.close(is_counted=is_new)
        return found

    async def start_sample(self, owner: str, body: SampleBody) -> dict[str, Any]:
        """Begin to sample."""
        if body.sampling_session_id is None or body.seq_id is None:
            raise ApiError(400, "send sampling_session_id and seq_id: create_sampling_session gives them")
        directory = await self.sampler_directory(owner, body.sampling_session_id)
        request = f"{body.sampling_session_id}/{body.seq_id}"
        draws = draws_of(body, self.gateway, self.executor.hello["stop_ids"], request)
        if not self.samples.has(request):
            most = draws.sampling.max_tokens * draws.count
            counted = await self.guard.admit_sample(
                owner, prompt_tokens=len(draws.prompt), most_tokens=most, count=draws.count
            )
            self.samples.start(owner, request, draws, directory, counted)
        ids = [f"{request}/{index}" for index in range(body.num_samples)]
        return {"request_id": request, "sample_sequence_ids": ids}

    async def sampler_directory(self, owner: str, sampler: str) -> str | None:
        """Directory of a sampling session's adapter; None is the base."""
        key = f"{owner}/{sampler}"
        if key not in self._samplers:
            reply, _ = await self.executor.ask("find_sampler", owner=owner, sampler=sampler)
            self._samplers[key] = reply["directory"]
        return self._samplers[key]

    async def model(self, owner: str, model: str) -> dict[str, Any]:
        """What the executor knows of a model."""
        reply, _ = await self.executor.ask("info", owner=owner, model=model)
        return reply

    def info(self, model: str, rank: int) -> dict[str, Any]:
        """What get_info answers."""
        data = {"arch": self.executor.hello["arch"], "model_name": self.model_name, "tokenizer_id": self.model_path}
        return {
            "type": "get_info",
            "model_data": data,
            "model_id": model,
            "is_lora": True,
            "lora_rank": rank,
            "model_name": self.model_name,
        }

    def run(self, owner: str, model: Mapping[str, Any]) -> dict[str, Any]:
        """A model as a training run of the protocol."""
        states = [state_of(each) for each in model["states"]]
        last = {kind: next((each for each in states if each["checkpoint_type"] == kind), None)
                for kind in ("training", "sampler")}  # fmt: skip
        return {
            "training_run_id": model["model_id"],
            "base_model": self.model_name,
            "model_owner": owner or "local",
            "is_lora": True,
            "corrupted": False,
            "lora_rank": model["lora_rank"],
            "last_request_time": _time(datetime.now(UTC).timestamp() - float(model["last_used_s"])),
            "last_checkpoint": last["training"],
            "last_sampler_checkpoint": last["sampler"],
            "user_metadata": model.get("user_metadata"),
        }


def state_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state as the protocol lists it."""
    expires = raw["expires_at"]
    return {**raw, "time": _time(raw["time"]), "expires_at": None if expires is None else _time(expires)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _check_optimizer(config: Any) -> None:
    kind = (config or {}).get("type", "adamw")
    if kind != "adamw":
        raise ApiError(400, f"optimizer {kind!r}: this server has adamw", param="optimizer_config")


def json_body(raw: bytes, *needed: str) -> dict[str, Any]:
    """A request in JSON.

    Args:
        raw: the body.
        *needed: fields that it must have.

    Raises:
        ApiError: it is none.
    """
    try:
        body = json.loads(raw or b"{}")
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    missing = [name for name in needed if body.get(name) is None]
    if missing:
        raise ApiError(400, f"the request has no {', '.join(missing)}", param=missing[0])
    return body
