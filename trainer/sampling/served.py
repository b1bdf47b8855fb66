"""Sampling on servers that load every new adapter: vLLM, or `trainer serve`; one client for both.

vLLM gets each published adapter under a new name, so that neither its adapter table nor its prefix cache can answer
with older weights; every response must carry that name. `trainer serve` replaces the adapter under one name, which is
the run's own, and every response must carry the version that the publish returned. Of a model that is trained in full,
the servers that the run started read all weights again. Two properties are measured, not
assumed: which distribution the server's logprobs belong to (one probe at startup), and whether the server computes the
same logprobs as the policy (a fixed sentence at each publish). docs/vllm.md and docs/serving.md say how to start one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast, final

import torch
from transformers import PreTrainedTokenizerBase

from trainer.config.unsupported import VLLM_DORA, VLLM_FULL, VLLM_TRUNCATED
from trainer.data.tokens import TokenSequence
from trainer.distributed.sharding import whole_of
from trainer.distributed.world import World
from trainer.errors import NumericalError
from trainer.model.adapters import RUN_ADAPTER
from trainer.model.batch import Batch
from trainer.model.policy import Policy
from trainer.sampling.sampler import MAX_CONCURRENT, SampleRequest, SamplingParams, decoded
from trainer.sampling.server_client import UNTOUCHED, RefusedError, SamplerError, Served, ServerClient
from trainer.types import Completion

SAMPLE_TIMEOUT_S: Final = 3600.0
HANG_FRAC: Final = 0.8
"""Part of the hang limit that a request may take: it must fail before the watchdog takes its wait for a hang."""
LOAD_TIMEOUT_S: Final = 300.0
CANARY: Final = "The quick brown fox jumps over the lazy dog. One, two, three, four, five, six. 12 + 30 = 42."
CANARY_BUDGET: Final = 0.2
"""Largest mean absolute difference of the canary's logprobs; bf16 rounding causes 0.04 to 0.06 with SmolLM2."""
T = TypeVar("T")


def request_timeout_s(hang_timeout_s: float) -> float:
    """How long a request may take, by how long a rank may stand still.

    >>> request_timeout_s(1800.0), request_timeout_s(86_400.0)
    (1440.0, 3600.0)
    """
    return min(SAMPLE_TIMEOUT_S, HANG_FRAC * hang_timeout_s)


@final
class ServedSampler:
    """Samples on servers that load adapters at run time; each prompt has its server, by the number of its row."""

    draws_apart: Final = True

    def __init__(
        self,
        clients: Sequence[ServerClient],
        tokenizer: PreTrainedTokenizerBase,
        world: World,
        *,
        name: str = "tunesmith",
        exchange_dir: Path | None = None,
        request_timeout_s: float = SAMPLE_TIMEOUT_S,
    ) -> None:
        """Connect to the servers and determine the mode of their logprobs; every rank calls it.

        Args:
            clients: of the servers, equal ones, in the same order on every rank.
            tokenizer: of the policy.
            world: the main rank publishes; every rank samples.
            name: begins the names of the run's adapters.
            exchange_dir: where adapters are written for the servers to read, on a shared file system; None is the
                temporary directory of this machine.
            request_timeout_s: how long the completions of one prompt may take.

        Raises:
            SamplerError: there is no server, or it is unsuitable for training.
        """
        self.tokenizer, self.world, self.clients = tokenizer, world, tuple(clients)
        self.client = self.clients[0]
        self.request_timeout_s = request_timeout_s
        self.canary: tuple[int, ...] = tuple(tokenizer.encode(CANARY, add_special_tokens=False))
        self.served: Served = self._on_main(self._look)
        run_id = world.from_main(secrets.token_hex(4))
        self.prefix = f"{name}-rollouts" if self.served.is_ours else f"{name}-{run_id}"
        self.version, self.name, self.num_published = -1, "", 0
        self.is_full = False
        """Whether all weights are published, under the base model's name."""
        self.labels: tuple[str | None, ...] = (None,) * len(self.clients)
        """Version of the published adapter as each server calls it; None: its name says it."""
        self.expected: list[float] = []
        """Canary's logprobs under the published policy."""
        if world.is_main:
            self.directory = Path(tempfile.mkdtemp(prefix="tunesmith-", dir=exchange_dir))
            self.loaded: list[str] = []
            self.finalizer = weakref.finalize(self, _retire, self.clients, self.loaded, self.directory)

    def _look(self) -> Served:
        """Look at every server; returns the properties of the first one, which the others share."""
        first, *_ = [
            client.through_restarts(partial(client.look, self.canary, len(self.tokenizer))) for client in self.clients
        ]
        return first

    def publish(self, policy: Policy, version: int) -> None:
        """Load the policy's adapter, or all of its weights, on the servers; every rank calls it.

        Completions carry `version` from now on.

        Raises:
            SamplerError: a server cannot load it.
            NumericalError: a server's logprobs differ from the policy's.
        """
        _refuse_unservable(policy, is_supervised=self.client.is_supervised)
        weights = {name: whole_of(parameter).detach() for name, parameter in policy.trained_parameters().items()}
        expected = self._canary_logprobs(policy)
        self.world.barrier()  # no rank may still be sampling with the adapter that is unloaded now
        self.num_published += 1
        self.is_full = policy.adapters is None
        name = self._name(version)
        found = self._on_main(lambda: self._load(policy, weights, name, expected))
        problem = next((problem for _, problem in found if problem is not None), None)
        if problem is not None:
            raise NumericalError(problem)
        self.version, self.name, self.labels = version, name, tuple(label for label, _ in found)

    def _name(self, version: int) -> str:
        """Of the model that requests name after this publish."""
        if self.is_full:
            return self.served.base
        return self.prefix if self.served.is_ours else f"{self.prefix}-v{version:06d}-n{self.num_published}"

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Draw `num_samples` completions per request; one list per request, in the same order.

        Raises:
            SamplerError: the server does not support these parameters.
            NumericalError: a response comes from another adapter, or its logprobs are not finite.
        """
        assert self.version >= 0, "publish before sampling"
        if not requests:
            return []
        self._refuse_params(requests, params)
        with ThreadPoolExecutor(min(len(requests), MAX_CONCURRENT), thread_name_prefix="vllm") as pool:
            return list(pool.map(lambda request: self._draw(request, params), requests))

    def _on_main(self, act: Callable[[], T]) -> T:
        """Run on the main rank; every rank returns its result or raises its error, so that no rank waits forever."""
        result, problem = self.world.on_main(act, (SamplerError, RefusedError, OSError))
        if problem is not None:
            raise SamplerError(problem)
        return cast(T, result)

    @torch.no_grad()
    def _canary_logprobs(self, policy: Policy) -> list[float]:
        """Logprob of each canary token except the first, under the policy."""
        policy.eval()
        sequence = TokenSequence(self.canary, (True,) * len(self.canary))
        logprobs: list[float] = policy(Batch.pack([sequence], policy.device)).logprobs.tolist()
        return logprobs

    def _load(
        self, policy: Policy, weights: dict[str, torch.Tensor], name: str, expected: list[float]
    ) -> list[tuple[str | None, str | None]]:
        """Replace the served adapter on every server; returns the version of each, and what is wrong with it."""
        is_replaced = self.served.is_ours or self.is_full
        directory = self.directory / (f"{self.prefix}@{self.num_published}" if is_replaced else name)
        directory.mkdir()
        policy.save(directory, weights)
        if self.served.is_ours:
            _name_base(directory, policy.model_path)
        found = [
            client.through_restarts(partial(self._load_on, client, name, directory, expected, policy.model_path))
            for client in self.clients
        ]
        for old in self.loaded:
            for client in () if is_replaced else self.clients:
                client.unload_adapter(old)
            shutil.rmtree(self.directory / old, ignore_errors=True)
        self.loaded[:] = [directory.name]
        self.expected = expected
        return found

    def _load_on(
        self, client: ServerClient, name: str, directory: Path, expected: list[float], model_path: str
    ) -> tuple[str | None, str | None]:
        """Load and compare as one, since a server that was restarted in between has only what was published before."""
        label: str | None = None
        if self.is_full:
            client.reload_weights(directory, timeout_s=LOAD_TIMEOUT_S)
        else:
            label = client.load_adapter(name, directory, timeout_s=LOAD_TIMEOUT_S)
        return label, self._canary_problem(client, name, expected, model_path)

    def restore(self, socket: Path) -> None:
        """Load what is published on a server that was restarted, before clients can reach it.

        Args:
            socket: of the new server.

        Raises:
            SamplerError: it cannot load it, or has other logprobs.
        """
        client = ServerClient(self.client.url, model=self.client.model, socket=socket)
        for name in self.loaded:
            served = self.served.base if self.is_full else name
            _, problem = self._load_on(client, served, self.directory / name, self.expected, client.model)
            if problem is not None:
                raise SamplerError(problem)

    def _canary_problem(self, client: ServerClient, name: str, expected: list[float], model_path: str) -> str | None:
        """What is wrong with the logprobs of a fixed sentence under a served adapter; None: they are ours."""
        body = {**UNTOUCHED, "model": name, "prompt": self.canary, "max_tokens": 1, "prompt_logprobs": 0}
        response = client.post("/v1/completions", body, timeout_s=LOAD_TIMEOUT_S)
        by_token = response["choices"][0]["prompt_logprobs"][1:]
        served = [each[str(token)]["logprob"] for each, token in zip(by_token, self.canary[1:], strict=True)]
        distance = sum(abs(ours - theirs) for ours, theirs in zip(expected, served, strict=True)) / len(expected)
        if distance <= CANARY_BUDGET:
            return None
        return (
            f"{client.url} serves {self.served.root}; with the adapter, its logprobs of a fixed sentence are "
            f"{distance:.3g} away from those of {model_path} (mean; at most {CANARY_BUDGET:g}). "
            f"Start it with the recipe's model and compute_dtype:\n{client.command()}"
        )

    def _refuse_params(self, requests: Sequence[SampleRequest], params: SamplingParams) -> None:
        """Refuse requests whose logprobs would be of another distribution, or that would be truncated."""
        is_raw = self.served.logprobs_mode == "raw_logprobs"
        _refuse_truncation(params)
        is_truncated = _is_truncated(params)
        if params.temperature != 1.0 and params.is_greedy:
            raise SamplerError(
                "vLLM returns logprobs of greedy completions at temperature 1 only: set rollout.temperature to 1"
            )
        if is_raw and params.temperature != 1.0:
            raise SamplerError(
                f"{self.client.url} returns logprobs at temperature 1; rollout.temperature is {params.temperature:g}. "
                "Start the server with --logprobs-mode processed_logprobs, or set rollout.temperature to 1."
            )
        if not is_raw and is_truncated:
            raise SamplerError(
                f"{self.client.url} returns logprobs after top_p, top_k and min_p. Turn them off, "
                "or start the server with --logprobs-mode raw_logprobs."
            )
        longest = max(len(request.prompt_ids) for request in requests) + params.max_completion_tokens
        if longest > self.served.max_model_tokens:
            raise SamplerError(
                f"a prompt and rollout.max_completion_tokens need {longest:,} tokens, and {self.client.url} takes "
                f"{self.served.max_model_tokens:,}. Start it with --max-model-len {longest}, or lower the limit."
            )

    def _draw(self, request: SampleRequest, params: SamplingParams) -> list[Completion]:
        copies = (
            request.num_samples if params.is_greedy else 1
        )  # vLLM refuses n > 1 greedy completions, which would be equal
        random_sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
        }
        body = {
            **UNTOUCHED,
            **({"temperature": 0.0} if params.is_greedy else random_sampling),
            "model": self.name,
            "prompt": request.prompt_ids,
            "n": request.num_samples // copies,
            "seed": request_seed(params.seed, params.step, request.row, request.turn) + request.first_sample,
            "max_tokens": params.max_completion_tokens,
            "stop": params.stop,
            "stop_token_ids": sorted(params.stop_ids),
            "logprobs": 0,
        }
        number = request.row % len(self.clients)
        client = self.clients[number]
        try:
            ask = partial(client.ask, "/v1/completions", body, timeout_s=self.request_timeout_s)
            answer = client.through_restarts(ask)
        except RefusedError as error:
            lost = "" if client.has_model(self.name) else f" It no longer has {self.name}: was it restarted?"
            raise SamplerError(f"{error}{lost}") from None
        response = answer.body
        if response["model"] != self.name or answer.version != self.labels[number]:
            given, wanted = answer.version or response["model"], self.labels[number] or self.name
            raise NumericalError(f"{client.url} answered with {given} instead of {wanted}")
        choices = sorted(response["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) * copies != request.num_samples:
            raise SamplerError(f"{client.url} returned {len(choices)} completions instead of {body['n']}")
        return [self._completion(choice, request, params) for choice in choices for _ in range(copies)]

    def _completion(self, choice: dict[str, Any], request: SampleRequest, params: SamplingParams) -> Completion:
        if choice.get("token_ids") is None:
            raise SamplerError(
                f"{self.client.url} returns no token ids (return_token_ids): use a newer vLLM, such as 0.32"
            )
        token_ids, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
        reason = choice["finish_reason"]
        if tuple(choice.get("prompt_token_ids") or ()) != request.prompt_ids or len(token_ids) != len(logprobs):
            raise SamplerError(f"{self.client.url} changed the prompt or lost logprobs; is there a proxy in between?")
        if not all(
            isinstance(value, float) and -9999.0 < value < 0.01 for value in logprobs
        ):  # vLLM writes -inf as -9999
            raise NumericalError(f"{self.client.url}: logprobs are not finite; the policy's weights are broken")
        is_full_length = reason == "length" and len(token_ids) == params.max_completion_tokens
        by_token, by_string = token_ids[-1:] and token_ids[-1] in params.stop_ids, choice["stop_reason"] in params.stop
        if not (is_full_length or (reason == "stop" and (by_token or by_string))):
            raise SamplerError(
                f"{self.client.url} ended a completion after {len(token_ids)} tokens ({reason}, "
                f"{choice.get('stop_reason')!r}), for a reason that is not in the recipe. Start it with "
                "--generation-config vllm, so that it adds no stop tokens and limits."
            )
        return Completion(token_ids, logprobs, reason, self.version, decoded(self.tokenizer, token_ids))


def request_seed(seed: int, step: int, row: int, turn: int = 0) -> int:
    """Seed of a row's first completion; vLLM itself adds n for the n-th one.

    >>> request_seed(0, 0, 0) != request_seed(0, 1, 0) != request_seed(0, 0, 1)
    True

    Args:
        seed: of the run.
        step: of the training.
        row: index of the row.
        turn: of the conversation, from 0.
    """
    text = f"{seed}:{step}:{row}" + (f":{turn}" if turn else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _is_truncated(params: SamplingParams) -> bool:
    """Whether improbable tokens are never sampled."""
    return not params.is_greedy and (params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0)


def _refuse_truncation(params: SamplingParams) -> None:
    if params.temperature != 1.0 and _is_truncated(params):
        raise SamplerError(VLLM_TRUNCATED)


def _refuse_unservable(policy: Policy, *, is_supervised: bool) -> None:
    if policy.adapters is None and not is_supervised:
        raise SamplerError(VLLM_FULL)
    if policy.adapters is not None and policy.adapters.config(RUN_ADAPTER).use_dora:
        raise SamplerError(VLLM_DORA)


def _name_base(directory: Path, model_path: str) -> None:
    """Write an absolute path of the base model: the server may run in another directory."""
    if Path(model_path).is_dir():
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(Path(model_path).resolve())
        file.write_text(json.dumps(config), encoding="utf-8")


def _retire(clients: Sequence[ServerClient], loaded: list[str], directory: Path) -> None:
    """Unload the adapters from servers that others started, if they still answer, and delete the files."""
    for client in (each for each in clients if not each.is_supervised):
        for name in loaded:
            with suppress(SamplerError, RefusedError):
                client.unload_adapter(name.partition("@")[0], tries=1)
    shutil.rmtree(directory, ignore_errors=True)
