"""`trainer serve --with-accounts`: open the store, print the first key, and count while the server runs."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import final

from fastapi import FastAPI

from trainer.control.key_cache import KeyCache
from trainer.control.meter import Meter
from trainer.control.prices import read_prices
from trainer.control.state import first_admin_key
from trainer.control.store import Store, store_url
from trainer.run.console import tell
from trainer.serve.access import AccountKeys
from trainer.serve.control import AuditRecorder, Control
from trainer.serve.control_api import add_control
from trainer.serve.metering import AccountMeter


@final
@dataclass(frozen=True)
class Accounts:
    """What a server with accounts has."""

    store: Store
    cache: KeyCache
    meter: Meter
    control: Control

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes of the control plane."""
        add_control(app, self.store, self.cache, self.meter)

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[None]:
        """Store what requests use within the block, and all of it at its end."""
        task = asyncio.create_task(self.meter.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            lost = await self.meter.flush()
            if lost:
                tell(f"the store is down: the use of {lost:,} requests is lost")
            self.store.close()


def open_accounts(arguments: argparse.Namespace) -> Accounts:
    """Open the store; where no valid admin key exists, one is made and printed, once.

    Raises:
        TrainerError: the store or the price table cannot be used.
    """
    prices = read_prices(arguments.prices)
    store = Store(store_url(arguments.store)).open()
    key = first_admin_key(store)
    if key is not None:
        sys.stdout.write(f"{key}\n")
        sys.stdout.flush()
        tell("the first admin key, shown only now: keep it, or make another with `trainer keys create`")
    cache, meter = KeyCache(store), Meter(store, prices)
    return Accounts(store, cache, meter, Control(AccountKeys(cache), AuditRecorder(store), AccountMeter(meter)))
