"""Every route but /health needs a key, and the scope that belongs to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from tiny import tiny_model_dir

from trainer.control.accounts import create_account
from trainer.control.audit import Actor
from trainer.control.key_cache import KeyCache
from trainer.control.keys import SCOPES, create_key
from trainer.control.meter import Meter
from trainer.control.prices import Prices
from trainer.control.store import Store
from trainer.serve import command
from trainer.serve.access import AccountKeys, scope_of
from trainer.serve.app import make_app
from trainer.serve.batch import only
from trainer.serve.batch_api import BatchStore
from trainer.serve.control import AuditRecorder, Control
from trainer.serve.control_api import add_control
from trainer.serve.engine_client import EngineClient
from trainer.serve.gateway import Gateway, Limits, served_source
from trainer.serve.metering import AccountMeter
from trainer.serve.models import ServedModels

ACTOR = Actor("cli test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("access")
    tiny_model_dir(root / "model")
    return root


@pytest.fixture(scope="module")
def gateway(place: Path) -> Gateway:
    models = ServedModels(served_source(str(place / "model")), "model")
    return Gateway(models, EngineClient(), Limits())


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    opened = Store(f"sqlite:///{place}/store.sqlite").open()
    create_account(opened, ACTOR, "team")
    return opened


@pytest.fixture
def app(gateway: Gateway, store: Store, place: Path) -> FastAPI:
    cache, meter = KeyCache(store), Meter(store, Prices())
    control = Control(AccountKeys(cache), AuditRecorder(store), AccountMeter(meter))
    made = make_app(gateway, BatchStore(only(gateway), place / "batches", control), control)
    add_control(made, store, cache, meter)

    @made.get("/v1/usage/broken")
    async def broken() -> None:
        raise ValueError("a secret prompt")

    return made


def table(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route, with a value for each variable."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes)  # nothing is mounted that the table does not show
    return [
        (
            method,
            route.path.replace("{name:path}", "x")
            .replace("{name}", "x")
            .replace("{identity}", "x")
            .replace("{account}", "x"),
        )
        for route in routes
        for method in sorted(route.methods or ())
    ]


def call(app: FastAPI, calls: list[tuple[str, str]], headers: dict[str, str], body: Any = None) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.request(method, path, headers=headers, json=body) for method, path in calls]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", "Basic dGVzdDp0ZXN0", "Bearer tsk_0000000000000000_" + "A" * 43]
)
def test_every_route_but_health_answers_401_without_a_key(app: FastAPI, given: str) -> None:
    routes = table(app)
    assert len(routes) > 25
    answers = dict(zip(routes, call(app, routes, {"Authorization": given} if given else {}), strict=True))
    assert answers.pop(("GET", "/health")).status_code == 200
    assert {route: answer.status_code for route, answer in answers.items() if answer.status_code != 401} == {}
    assert all(answer.json()["error"]["code"] == "invalid_api_key" for answer in answers.values())
    (unknown,) = call(app, [("GET", "/v1/nothing")], {})
    assert unknown.status_code == 401


@pytest.mark.parametrize("host", ["server/health?", "server/health#", "server/metrics?"])
def test_a_host_header_that_looks_like_an_open_route_opens_nothing(app: FastAPI, host: str) -> None:
    routes = [("GET", "/v1/keys"), ("GET", "/v1/models"), ("GET", "/v1/audit"), ("GET", "/metrics")]
    assert [each.status_code for each in call(app, routes, {"Host": host})] == [401] * 4
    assert [each.status_code for each in call(app, [("GET", "/health%3F/../v1/keys")], {})] == [401]


@pytest.mark.parametrize("scope", sorted({*SCOPES} - {"admin"}))
def test_a_key_opens_the_routes_of_its_scope_and_no_others(app: FastAPI, store: Store, scope: str) -> None:
    key = create_key(store, ACTOR, "team", {scope})
    routes = table(app)
    answers = zip(routes, call(app, routes, {"Authorization": f"Bearer {key}"}, body={}), strict=True)
    for (method, path), answer in answers:
        needed = scope_of(path)
        is_allowed = path == "/health" or needed in ("any", scope)
        code = (
            answer.json().get("error", {}).get("code")
            if answer.headers.get("content-type") == "application/json"
            else None
        )
        assert ((answer.status_code, code) == (403, "missing_scope")) is not is_allowed, (
            method,
            path,
            answer.status_code,
        )


def test_the_text_of_an_unexpected_error_reaches_neither_client_nor_log(
    app: FastAPI, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    key = create_key(store, ACTOR, "team", {"admin"})
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "r1"}
    (answer,) = call(app, [("GET", "/v1/usage/broken")], headers)
    logged = caplog.text
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "request r1: ValueError" in logged
    assert "test_serve_access.py:" in logged
    assert "secret" not in answer.text + logged


def test_keys_of_a_file_open_every_route(gateway: Gateway, place: Path) -> None:
    limited = Gateway(
        gateway.models, gateway.engine, Limits(api_key_digests=frozenset({hashlib.sha256(b"one").digest()}))
    )
    app = make_app(limited, BatchStore(only(limited), place / "batches"))
    routes = [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/ready"), ("GET", "/health")]
    assert [each.status_code for each in call(app, routes, {})] == [401, 401, 401, 200]
    assert [each.status_code for each in call(app, routes, {"Authorization": "Bearer one"})] == [200, 200, 503, 200]
    assert json.loads(call(app, routes[:1], {"Authorization": "Bearer one"})[0].text)["data"][0]["id"] == "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there are no keys: add --with-accounts, or --api-key-file"),
        (["--store", "sqlite:///a"], "--store needs --with-accounts"),
        (["--with-accounts", "--api-key-file", "a"], "exclude each other"),
        (["--with-accounts", "--store", "mysql://a/b"], "the store is SQLite or PostgreSQL"),
        (["--with-accounts", "--prices", "missing.yaml"], "--prices missing.yaml: "),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", "missing.pem", "--tls-key", "missing.pem"], "--tls-cert missing.pem"),
        (["--batch-keep", "long"], "--batch-keep long: write a duration"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_engine_starts(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    assert command.main([str(place / "model"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert resource.getrlimit(resource.RLIMIT_CORE) == limit
