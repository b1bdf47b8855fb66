"""`trainer serve --deployments`: the control process and gateway of all deployments of a store."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.control.core_dumps import forbid_core_dumps
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
    from trainer.serve.fleet import Fleet
    from trainer.serve.fleet_api import make_fleet_app
    from trainer.serve.listening import address, make_server, traces_of

    traces = traces_of(arguments)
    backend = await _backend(arguments, directory)
    fleet = Fleet(accounts.store, accounts.meter, backend, read_prices(arguments.prices), traces)
    app = make_fleet_app(fleet, accounts.store, accounts.control)
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

    async with accounts.counting():
        task: asyncio.Task[Any] = asyncio.create_task(carry_out())
        tell(f"{address(arguments)}/v1 serves the deployments of {accounts.store.shown}")
        try:
            await server.serve()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await fleet.close(float(arguments.drain_s))
            if traces is not None:
                traces.close()
    if error is not None:
        raise error
    return 0 if server.started else 1
