"""`trainer serve --deployments`: the control process and gateway of all deployments of a store."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.control.core_dumps import forbid_core_dumps
from trainer.control.durations import seconds_of
from trainer.control.prices import read_prices
from trainer.errors import TrainerError
from trainer.run.console import tell
from trainer.serve.backend import Backend, LocalBackend

if TYPE_CHECKING:
    from trainer.serve.with_accounts import Accounts


def serve_deployments(arguments: argparse.Namespace, accounts: Accounts) -> int:
    """Serve until SIGTERM or Ctrl-C; requests in flight are finished first.

    Raises:
        TrainerError: another process took the deployments over.
    """
    forbid_core_dumps()
    with tempfile.TemporaryDirectory(prefix="trainer-serve-") as directory:  # mode 0700
        return asyncio.run(_listen(arguments, accounts, Path(directory)))


async def _backend(arguments: argparse.Namespace, directory: Path) -> Backend:
    """What starts engines, connected."""
    if arguments.backend == "local":
        return LocalBackend(directory, arguments.region)
    from trainer.serve.ray_backend import RayBackend

    backend = RayBackend(arguments.ray_address)
    try:
        await backend.open()
    except BaseException:
        await backend.close()
        raise
    return backend


async def _listen(arguments: argparse.Namespace, accounts: Accounts, directory: Path) -> int:
    from trainer.serve.batch_api import BatchStore, add_batches, running_batches
    from trainer.serve.fleet import Fleet
    from trainer.serve.fleet_address import add_addresses
    from trainer.serve.fleet_api import make_fleet_app
    from trainer.serve.listening import address, make_server, traces_of

    traces = traces_of(arguments)
    backend = await _backend(arguments, directory)
    fleet = Fleet(accounts.store, accounts.meter, backend, read_prices(arguments.prices), traces)
    keep_s = seconds_of(arguments.batch_keep, "--batch-keep")
    batches = BatchStore(fleet.route, Path(arguments.batch_dir), accounts.control, keep_s=keep_s)
    app = make_fleet_app(fleet, accounts.store, accounts.control)
    add_batches(app, batches)
    add_addresses(app, fleet)
    accounts.add_routes(app)
    if traces is not None:
        traces.around(app)
    server = make_server(app, arguments)
    error: TrainerError | None = None

    async def carry_out() -> None:
        nonlocal error
        try:
            await fleet.run()
        except TrainerError as found:
            error = found
            server.should_exit = True

    async def answer_batches() -> None:
        await fleet.has_taken_over.wait()
        async with running_batches(batches):
            await asyncio.Event().wait()

    async with accounts.counting():
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(answer_batches()), asyncio.create_task(carry_out())]
        tell(f"{address(arguments)}/v1 serves the deployments of {accounts.store.shown}")
        try:
            await server.serve()
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await fleet.close(float(arguments.drain_s))
            if traces is not None:
                traces.close()
    if error is not None:
        raise error
    return 0 if server.started else 1
