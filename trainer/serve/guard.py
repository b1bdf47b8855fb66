"""What happens to every request around its route: its id, its key, its count."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from typing import Final, final

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.serve.api_errors import ApiError
from trainer.serve.gateway import Gateway

OPEN_ROUTES: Final = frozenset({"/health", "/ready"})
"""Routes that need no key."""
LEFT: Final = 499
"""Status, in the counters, of a request whose client left before the response began."""

LOG: Final = logging.getLogger("uvicorn.error")


@final
class Guard:
    """Middleware that adds one call to each part of a stream, and no task."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        """Wrap an application."""
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, status = Headers(scope=scope), LEFT
        request_id = _request_id(headers.get("x-request-id", ""))

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"] in OPEN_ROUTES or self._has_key(headers):
                await self._app(scope, receive, send_on)
            else:
                error = ApiError(401, "no valid API key: send `Authorization: Bearer KEY`", code="invalid_api_key")
                await JSONResponse(error.body(), error.status)(scope, receive, send_on)
        except Exception as error:
            LOG.exception("request %s", request_id)
            if status != LEFT:
                raise  # the response has begun
            found = ApiError(500, f"the server failed ({type(error).__name__}); its log has the details")
            await JSONResponse(found.body(), found.status)(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._gateway.metrics.requests.labels(route, status).inc()

    def _has_key(self, headers: Headers) -> bool:
        digests = self._gateway.limits.api_key_digests
        if not digests:
            return True
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        return kind.lower() == "bearer" and any(hmac.compare_digest(digest, each) for each in digests)


def _request_id(given: str) -> str:
    """The client's own id where it is a printable one, or a new one."""
    is_usable = given.isascii() and 0 < len(given) <= 128 and given.isprintable()
    return given if is_usable else secrets.token_hex(8)
