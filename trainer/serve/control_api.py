"""The routes of accounts, keys, quotas, usage and audit. Every change is committed with its audit entry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from time import time
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from trainer.control import accounts, audit, keys, quotas, usage
from trainer.control.key_cache import KeyCache
from trainer.control.meter import Meter
from trainer.control.prices import amount
from trainer.control.store import Store, StoreDownError
from trainer.errors import UserError
from trainer.serve.access import principal_of
from trainer.serve.api_errors import ApiError
from trainer.serve.control import actor_of

T = TypeVar("T")
MAX_ENTRIES = 1000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AccountBody(_Body):
    """POST /v1/accounts."""

    name: str


class KeyBody(_Body):
    """POST /v1/keys."""

    account: str
    scopes: list[str] = ["inference"]
    expires_s: float | None = None
    note: str = ""


class RotateBody(_Body):
    """POST /v1/keys/ID/rotate."""

    grace_s: float = 0.0


class QuotaBody(_Body):
    """PUT /v1/quotas/ACCOUNT."""

    model: str = quotas.ALL
    limits: dict[str, str | float | None]
    """Value by limit; null removes it."""


def add_control(app: FastAPI, store: Store, cache: KeyCache, meter: Meter) -> None:
    """Add the routes.

    Args:
        app: the application.
        store: is read and changed.
        cache: forgets keys when one changes.
        meter: forgets limits when one changes.
    """
    add_store_errors(app)
    _add_accounts(app, store, cache)
    _add_keys(app, store, cache)
    _add_quotas(app, store, meter)
    _add_usage(app, store, meter)
    _add_audit(app, store)


def add_store_errors(app: FastAPI) -> None:
    """Answer for errors of the store: 503 while it is down, 404 for what is not there, 400 for what must be changed."""

    @app.exception_handler(StoreDownError)
    async def down(_request: Request, _error: StoreDownError) -> Response:
        found = ApiError(503, "the store does not answer now; nothing was changed", code="store_down", retry_s=5)
        return JSONResponse(found.body(), found.status, headers=found.headers())

    @app.exception_handler(UserError)
    async def wrong(_request: Request, error: UserError) -> Response:
        found = ApiError(404 if isinstance(error, accounts.MissingError) else 400, str(error))
        return JSONResponse(found.body(), found.status)


async def in_thread(work: Callable[[], T]) -> T:
    """Wait for the store without stopping the event loop."""
    return await asyncio.to_thread(work)


def _add_accounts(app: FastAPI, store: Store, cache: KeyCache) -> None:
    @app.get("/v1/accounts")
    async def list_accounts() -> dict[str, Any]:
        return {"data": [asdict(each) for each in await in_thread(lambda: accounts.list_accounts(store))]}

    @app.post("/v1/accounts")
    async def create_account(body: AccountBody, request: Request) -> dict[str, Any]:
        await in_thread(lambda: accounts.create_account(store, actor_of(request), body.name))
        return {"name": body.name}

    @app.post("/v1/accounts/{name}/disable")
    async def disable(name: str, request: Request) -> dict[str, Any]:
        return await _switch(name, request, is_disabled=True)

    @app.post("/v1/accounts/{name}/enable")
    async def enable(name: str, request: Request) -> dict[str, Any]:
        return await _switch(name, request, is_disabled=False)

    async def _switch(name: str, request: Request, *, is_disabled: bool) -> dict[str, Any]:
        await in_thread(lambda: accounts.set_disabled(store, actor_of(request), name, is_disabled=is_disabled))
        cache.forget()
        return {"name": name, "is_disabled": is_disabled}


def _add_keys(app: FastAPI, store: Store, cache: KeyCache) -> None:
    @app.get("/v1/keys")
    async def list_keys(account: str | None = None) -> dict[str, Any]:
        found = await in_thread(lambda: keys.list_keys(store, account))
        now = time()
        return {
            "data": [asdict(each) | {"scopes": sorted(each.scopes), "problem": each.problem(now)} for each in found]
        }

    @app.post("/v1/keys")
    async def create_key(body: KeyBody, request: Request) -> dict[str, Any]:
        def work() -> str:
            actor = actor_of(request)
            return keys.create_key(store, actor, body.account, body.scopes, expires_s=body.expires_s, note=body.note)

        return {"key": await in_thread(work)}

    @app.post("/v1/keys/{identity}/revoke")
    async def revoke_key(identity: str, request: Request) -> dict[str, Any]:
        await in_thread(lambda: keys.revoke_key(store, actor_of(request), identity))
        cache.forget()
        return {"id": identity, "problem": "the key is revoked"}

    @app.post("/v1/keys/{identity}/rotate")
    async def rotate_key(identity: str, body: RotateBody, request: Request) -> dict[str, Any]:
        key = await in_thread(lambda: keys.rotate_key(store, actor_of(request), identity, grace_s=body.grace_s))
        cache.forget()
        return {"key": key}


def _add_quotas(app: FastAPI, store: Store, meter: Meter) -> None:
    @app.put("/v1/quotas/{account}")
    async def set_quota(account: str, body: QuotaBody, request: Request) -> dict[str, Any]:
        changes = {name: None if value is None else _words(value) for name, value in body.limits.items()}
        await in_thread(lambda: quotas.set_quota(store, actor_of(request), account, changes, model=body.model))
        meter.forget()
        return await _limits(account)

    @app.get("/v1/quotas/{account}")
    async def get_quota(account: str) -> dict[str, Any]:
        return await _limits(account)

    @app.get("/v1/quota")
    async def own_quota(request: Request) -> dict[str, Any]:
        principal = principal_of(request)
        assert principal is not None
        return await _limits(principal.account)

    async def _limits(account: str) -> dict[str, Any]:
        await meter.flush()

        def work() -> dict[str, Any]:
            found = [
                {"model": each.model, "limit": each.limit, "value": each.shown}
                for each in quotas.quotas_of(store, account)
            ]
            used = {
                "credit": amount(usage.spent(store, account)),
                "device_seconds": usage.device_seconds(store, account),
                "training_tokens_per_day": usage.trained(store, account, usage.today()),
            }
            return {"account": account, "data": found, "used": used}

        return await in_thread(work)


def _words(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.9f}".rstrip("0").rstrip(".")


def _add_usage(app: FastAPI, store: Store, meter: Meter) -> None:
    @app.get("/v1/usage")
    async def used(
        request: Request, by: str = "account,model", account: str | None = None, since: str | None = None
    ) -> dict[str, Any]:
        principal = principal_of(request)
        assert principal is not None
        whose = account if principal.is_admin else principal.account
        if account is not None and whose != account:
            raise ApiError(403, f"use of {account} needs a key with the scope admin", code="missing_scope")
        await meter.flush()
        groups = [name for name in by.split(",") if name]
        rows = await in_thread(lambda: usage.usage_by(store, groups, account=whose, since=since))
        return {"data": [{**row, "cost": amount(row["cost"])} for row in rows]}


def _add_audit(app: FastAPI, store: Store) -> None:
    @app.get("/v1/audit")
    async def list_entries(since: int = 0, limit: int = 100) -> dict[str, Any]:
        most = max(1, min(limit, MAX_ENTRIES))
        found = await in_thread(lambda: list(audit.entries(store, since=since, limit=most)))
        return {"data": [asdict(each) for each in found]}

    @app.get("/v1/audit/verify")
    async def verify(contains: str | None = None) -> dict[str, Any]:
        expected = None if contains is None else audit.Head.parse(contains)
        try:
            head = await in_thread(lambda: audit.verify(store, expected))
        except audit.AuditError as error:
            return {"is_whole": False, "problem": str(error)}
        return {"is_whole": True, "head": str(head)}
