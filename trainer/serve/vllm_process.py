"""vLLM as the engine of `trainer serve`: refuse what cannot work, start it on a private socket, keep it running."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, final

from trainer.config.recipe import ModelSettings
from trainer.errors import LaunchError, UserError
from trainer.http import direct_client
from trainer.managed.place import ServerPlace
from trainer.managed.server import ManagedServer, ServerCommand
from trainer.managed.vllm import VllmOptions, find_python, look_at, vllm_argv, vllm_environment
from trainer.planning.model_facts import find_model_config
from trainer.run.console import tell
from trainer.serve.vllm_engine import URL, VllmEngine

BASE: Final = "base"
"""Name of the base model in vLLM; clients never see it."""
EMBEDDED_ONLY: Final = {"kv_cache_fraction": 0.1, "kv_cache_tokens": None, "chunk_tokens": 256, "draft_model": None}
"""Arguments of the embedded engine, with their defaults."""
OPTIONS: Final = ("--structured-outputs-config", '{"backend": "guidance"}')
"""The gateway's grammars are llguidance's."""
MAX_ADAPTERS: Final = 8
"""Adapters that one batch of vLLM may mix."""


@final
class VllmProcess:
    """Supervises one vLLM for the gateway."""

    def __init__(self, arguments: argparse.Namespace, model: ModelSettings, directory: Path) -> None:
        """Prepare; `launch` starts it.

        Args:
            arguments: of `trainer serve`.
            model: to serve.
            directory: that only the owner can enter.

        Raises:
            UserError: an argument goes with the embedded engine only.
            LaunchError: there is no suitable interpreter.
        """
        refuse_embedded_arguments(arguments)
        python = look_at(find_python(arguments.vllm_python))
        devices = tuple(filter(None, (arguments.vllm_devices or ("" if python.is_cpu else "0")).split(",")))
        if devices and python.is_cpu:
            raise LaunchError(f"--vllm-devices: {python.path} has a vLLM for CPUs")
        options = VllmOptions(
            model=model.path,
            dtype=model.compute_dtype,
            max_model_tokens=arguments.max_model_tokens,
            devices=devices,
            max_adapter_rank=arguments.max_adapter_rank,
            max_adapters=MAX_ADAPTERS,
            logprobs_mode="raw_logprobs",  # as the embedded engine reports them
            revision=model.revision,
            trusts_remote_code=model.trust_remote_code,
            served_name=BASE,
            extra=(*OPTIONS, "--max-num-seqs", str(arguments.max_rows), *arguments.vllm_argument),
        )
        place = ServerPlace(directory)
        command = ServerCommand(
            "vLLM", partial(vllm_argv, python.path, options), Path(arguments.vllm_log), vllm_environment(options)
        )
        self._server = ManagedServer(command, place, tell)
        self.client = VllmEngine(place, BASE, {"vocab": _vocab_size(model)})

    def launch(self) -> None:
        """Begin to start it."""
        self._server.launch()
        tell(f"vLLM is starting; its log: {self._server.command.log}")

    async def start(self, adapters: Callable[[], dict[str, str]]) -> None:
        """Wait until it is healthy and has the adapters; from then on it is started again whenever it dies.

        Args:
            adapters: name and path of each adapter that is served now.

        Raises:
            LaunchError: it does not become healthy, or an adapter cannot be served.
        """
        await asyncio.to_thread(self._server.start, self.client.restore)
        with direct_client(self._server.place.socket) as client:
            (card,) = client.get(f"{URL}/v1/models").json()["data"]
        self.client.hello["window"] = int(card["max_model_len"])
        for name, path in adapters().items():
            reply = await self.client.ask("load", name=name, path=path)
            if not reply["ok"]:
                raise LaunchError(str(reply["error"]))

    async def stop(self) -> None:
        """End it."""
        await self.client.close()
        await asyncio.to_thread(self._server.stop)


def _vocab_size(model: ModelSettings) -> int:
    config = find_model_config(model.path, [], model.revision)
    if config is None:
        raise LaunchError(f"{model.path}: has no config.json, or is not in the hub cache of this machine yet")
    return int(config.get("text_config", config)["vocab_size"])


def refuse_embedded_arguments(arguments: argparse.Namespace) -> None:
    """Refuse arguments that vLLM does not have.

    Raises:
        UserError: names the first one.
    """
    for name, default in EMBEDDED_ONLY.items():
        if getattr(arguments, name) != default:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} goes with the embedded engine; for vLLM see --vllm-argument")
