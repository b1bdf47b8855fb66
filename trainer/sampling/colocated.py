"""Servers on the devices that train: asleep while the policy learns. Used by `open_sampler` and the loop of rft.

The servers and the trainer take turns with a device's memory. Before the servers wake, every rank gives back what its
allocator keeps for later; they sleep (level 1: weights in host memory, cache discarded) before anything is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, final

import torch

from trainer.distributed.world import World
from trainer.model.policy import Policy
from trainer.sampling.sampler import Sampler, SampleRequest, SamplingParams
from trainer.sampling.server_client import RefusedError, SamplerError, ServerClient
from trainer.types import Completion

SLEEP_TIMEOUT_S: Final = 300.0


@final
class ColocatedSampler:
    """Wakes the servers to publish and sample; `rest` lets them sleep."""

    def __init__(self, inner: Sampler, clients: Sequence[ServerClient], world: World) -> None:
        """Take over servers that are awake.

        Args:
            inner: samples on them.
            clients: of the servers.
            world: the ranks; the main one talks to the servers.
        """
        self._inner, self._clients, self._world = inner, tuple(clients), world
        self.is_awake = True

    @property
    def draws_apart(self) -> bool:
        """See `Sampler`."""
        return self._inner.draws_apart

    def publish(self, policy: Policy, version: int) -> None:
        """Wake the servers and give them the policy's weights; every rank calls it."""
        if not self.is_awake:
            release_cached(self._world)
            self._tell_all("wake up", lambda client: client.set_sleeping(False, timeout_s=SLEEP_TIMEOUT_S))
            self.is_awake = True
        self._inner.publish(policy, version)

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Draw; see `Sampler`."""
        assert self.is_awake, "publish before sampling"
        return self._inner.sample(requests, params)

    def rest(self) -> None:
        """Let the servers sleep, once all ranks have what they drew; every rank calls it.

        Raises:
            SamplerError: one does not sleep.
        """
        if self.is_awake:
            self._world.barrier()
            self.is_awake = False
            self._tell_all("sleep", lambda client: client.set_sleeping(True, timeout_s=SLEEP_TIMEOUT_S))

    def restored(self, socket: Path) -> None:
        """A server was started again: it sleeps too if the others do.

        Args:
            socket: of the new server.
        """
        if not self.is_awake:
            first = self._clients[0]
            ServerClient(first.url, model=first.model, socket=socket).set_sleeping(True, timeout_s=SLEEP_TIMEOUT_S)

    def _tell_all(self, what: str, act: Callable[[ServerClient], None]) -> None:
        def tell() -> None:
            for client in self._clients:
                client.through_restarts(partial(act, client))

        _, problem = self._world.on_main(tell, (SamplerError, RefusedError, OSError))
        if problem is not None:
            raise SamplerError(f"the servers could not be told to {what}: {problem}")


def rest(sampler: Sampler) -> None:
    """Let a sampler's servers sleep, if they share the devices that are about to learn.

    Args:
        sampler: of the run.
    """
    if isinstance(sampler, ColocatedSampler):
        sampler.rest()


def release_cached(world: World) -> None:
    """Give the device's memory that no tensor uses back to other processes; returns when all ranks have."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    world.barrier()
