"""The vLLM servers of a run: refuse what cannot work, start them, keep them, end them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Self, final

from trainer.config.recipe import Recipe, RFTRecipe
from trainer.config.shape import TrainingShape
from trainer.config.unsupported import (
    VLLM_ASLEEP_CPU,
    VLLM_BESIDE,
    VLLM_DEVICES,
    VLLM_FULL_SHARDED,
    VLLM_MACHINES,
    VLLM_QUANTIZATION,
)
from trainer.errors import LaunchError
from trainer.managed.place import ServerPlace
from trainer.managed.server import ManagedServer, ServerCommand
from trainer.managed.vllm import (
    VllmOptions,
    VllmPython,
    find_python,
    look_at,
    reserved_devices,
    split_devices,
    vllm_argv,
    vllm_environment,
)

SHORTEST: Final = 64
"""Tokens that a server must take at least: the sampler's fixed sentence has 40."""


def refuse_unmanageable(recipe: Recipe, shape: TrainingShape) -> VllmPython | None:
    """Refuse a recipe whose servers could not be started; returns their interpreter, None where there are none.

    Args:
        recipe: of the run.
        shape: on which it runs.

    Raises:
        LaunchError: says what is missing and where to name it.
    """
    if not isinstance(recipe, RFTRecipe) or not recipe.rollout.is_managed:
        return None
    if shape.nodes > 1:
        raise LaunchError(f"shape {shape.name}: {VLLM_MACHINES}")
    if recipe.rollout.is_colocated and shape.device == "cpu":
        raise LaunchError(f"shape {shape.name}: {VLLM_ASLEEP_CPU}")
    if recipe.rollout.is_colocated and shape.vllm_gpus:
        raise LaunchError(f"shape {shape.name} {VLLM_BESIDE}")
    num_devices = num_server_devices(recipe, shape)
    if shape.device == "cuda" and not num_devices:
        raise LaunchError(f"shape {shape.name} {VLLM_DEVICES}")
    if recipe.lora is None and shape.sharding == "full" and shape.num_ranks > 1:
        raise LaunchError(f"shape {shape.name}: {VLLM_FULL_SHARDED}")
    replicas = recipe.rollout.vllm.replicas
    if shape.device == "cuda" and num_devices % replicas:
        raise LaunchError(f"rollout.vllm.replicas: {replicas} do not divide the {num_devices} devices of {shape.name}")
    if recipe.model.quantization is not None:
        raise LaunchError(f"model.quantization: {VLLM_QUANTIZATION}")
    python = look_at(find_python(recipe.rollout.vllm.python or shape.vllm_python))
    if python.is_cpu != (shape.device == "cpu"):
        built = "CPUs" if python.is_cpu else "GPUs"
        raise LaunchError(f"{python.path} has a vLLM for {built}; shape {shape.name} trains on {shape.device}")
    return python


def num_server_devices(recipe: RFTRecipe, shape: TrainingShape) -> int:
    """On how many devices of the shape the servers run; 0 on a CPU."""
    return shape.gpus if recipe.rollout.is_colocated else shape.vllm_gpus


@final
class RunServers:
    """The servers that one run starts; within the block they run, afterwards none of their processes does."""

    def __init__(
        self, recipe: RFTRecipe, shape: TrainingShape, log: Callable[[int], Path], say: Callable[[str], None]
    ) -> None:
        """Prepare; entering the block starts them.

        Args:
            recipe: of the run.
            shape: on which it runs.
            log: file for the output of each replica, by its number.
            say: tells the user what happens to them.

        Raises:
            LaunchError: they cannot be started here.
        """
        python = refuse_unmanageable(recipe, shape)
        assert python is not None, "the recipe asks for servers"
        settings, self._say = recipe.rollout.vllm, say
        self.directory = Path(tempfile.mkdtemp(prefix="tunesmith-vllm-"))  # mode 0700
        devices = reserved_devices(num_server_devices(recipe, shape), shape.gpus)
        self.servers = []
        for number, part in enumerate(split_devices(devices, settings.replicas)):
            options = _options(recipe, part)
            command = ServerCommand(
                f"vLLM server {number}",
                partial(vllm_argv, python.path, options),
                log(number),
                vllm_environment(options),
                settings.start_timeout_s,
            )
            place = ServerPlace(self.directory, number, settings.start_timeout_s)
            self.servers.append(ManagedServer(command, place, say))
        self._python = python

    def __enter__(self) -> Self:
        """Begin to start them; `wait` waits for them."""
        count = len(self.servers)
        self._say(
            f"starting {count} vLLM server{'s' if count > 1 else ''} ({self._python.version}, {self._python.path})"
        )
        try:
            for server in self.servers:
                server.launch()
        except BaseException:
            self.close()
            raise
        return self

    def wait(self, restore: Callable[[Path], None]) -> None:
        """Wait until all are ready.

        Args:
            restore: called with the socket of each start, before clients can reach it.

        Raises:
            LaunchError: one does not become ready, with the end of its log.
        """
        for server in self.servers:
            server.start(restore)

    def __exit__(self, *_: object) -> None:
        """End them."""
        self.close()

    def close(self) -> None:
        """End them, and delete their sockets and adapters."""
        for server in self.servers:
            server.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def _options(recipe: RFTRecipe, devices: tuple[str, ...]) -> VllmOptions:
    rollout, model = recipe.rollout, recipe.model
    longest = rollout.vllm.max_model_tokens or max(recipe.data.max_seq_tokens, SHORTEST)
    return VllmOptions(
        model=model.path,
        dtype=model.compute_dtype,
        max_model_tokens=longest,
        devices=devices,
        max_adapter_rank=recipe.lora.rank if recipe.lora is not None else None,
        reloads_weights=recipe.lora is None,
        colocated_frac=rollout.vllm.gpu_memory_frac if rollout.is_colocated else None,
        revision=model.revision,
        trusts_remote_code=model.trust_remote_code,
        extra=tuple(rollout.vllm.arguments),
    )
