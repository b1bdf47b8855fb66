"""`trainer serve --deployments`: the control process and gateway of all deployments of a store."""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.control.core_dumps import forbid_core_dumps
from trainer.control.prices import read_prices
from trainer.errors import TrainerError
from trainer.run.console import tell
from trainer.serve.control import WithoutContent
from trainer.serve.tls import tls_settings

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


async def _listen(arguments: argparse.Namespace, accounts: Accounts, directory: Path) -> int:
    import uvicorn

    from trainer.serve.fleet import Fleet
    from trainer.serve.fleet_api import make_fleet_app

    fleet = Fleet(accounts.store, accounts.meter, directory, read_prices(arguments.prices), arguments.region)
    app = make_fleet_app(fleet, accounts.store, accounts.control)
    accounts.add_routes(app)
    logging.getLogger("uvicorn.error").addFilter(WithoutContent())
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=arguments.drain_s,
        **tls_settings(arguments),
    )
    server = uvicorn.Server(config)
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
        scheme = "http" if arguments.tls_cert is None else "https"
        tell(f"{scheme}://{arguments.host}:{arguments.port}/v1 serves the deployments of {accounts.store.shown}")
        try:
            await server.serve()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await fleet.close(float(arguments.drain_s))
    if error is not None:
        raise error
    return 0 if server.started else 1
