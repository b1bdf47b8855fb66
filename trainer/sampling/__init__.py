"""Samplers: token ids in, completions with logprobs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import LaunchError
from trainer.managed.place import ServerPlace
from trainer.managed.run_servers import RunServers
from trainer.planning.plan import RFTPlan
from trainer.sampling.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.distributed.world import World
    from trainer.model.policy import Policy


@contextmanager
def open_sampler(
    plan: RFTPlan,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    *,
    server_log: Callable[[int], Path],
    say: Callable[[str], None],
) -> Iterator[Sampler]:
    """The sampler that the recipe names; servers that it starts run within the block.

    Args:
        plan: of the run.
        policy: whose weights are sampled from.
        tokenizer: of the policy.
        world: the ranks; only servers need them.
        server_log: file for the output of a server that the run starts, by its number.
        say: tells the user what happens to the servers.

    Raises:
        LaunchError: the run's servers cannot be started.
        SamplerError: there is no server, or it is unsuitable for training.
    """
    recipe, rollout = plan.recipe, plan.recipe.rollout
    if rollout.sampler == "local":
        from trainer.sampling.local import LocalSampler

        sampler = LocalSampler(policy, tokenizer)
        if sampler.note is not None:
            say(sampler.note)
        yield sampler
        return
    from trainer.sampling.colocated import ColocatedSampler, release_cached
    from trainer.sampling.served import ServedSampler, request_timeout_s
    from trainer.sampling.server_client import ServerClient

    name, timeout_s = str(tokenizer.name_or_path), request_timeout_s(recipe.recovery.hang_timeout_s)
    with ExitStack() as stack:
        if not rollout.is_managed:
            url = rollout.vllm_url if rollout.sampler == "vllm" else rollout.server_url
            assert url is not None, "config/semantics.py demands it"
            client = ServerClient(url, model=name)
            yield ServedSampler([client], tokenizer, world, name=recipe.name, request_timeout_s=timeout_s)
            return
        opened: list[ServedSampler] = []

        colocated: list[ColocatedSampler] = []

        def restore(socket: Path) -> None:
            for sampler in opened:
                sampler.restore(socket)
            for sleeper in colocated:
                sleeper.restored(socket)

        def start() -> Path:
            servers = stack.enter_context(RunServers(recipe, plan.shape, server_log, say))
            servers.wait(restore)
            return servers.directory

        if rollout.is_colocated:
            release_cached(world)
        directory, problem = world.on_main(start, (LaunchError,))
        if problem is not None or directory is None:
            raise LaunchError(problem)
        places = [
            ServerPlace(directory, number, rollout.vllm.start_timeout_s) for number in range(rollout.vllm.replicas)
        ]
        clients = [ServerClient(f"http://vllm-{each.number}", model=name, place=each) for each in places]
        opened.append(
            ServedSampler(
                clients, tokenizer, world, name=recipe.name, exchange_dir=directory, request_timeout_s=timeout_s
            )
        )
        if not rollout.is_colocated:
            yield opened[0]
            return
        colocated.append(ColocatedSampler(opened[0], clients, world))
        yield colocated[0]
