"""What happens to every request around its route: its id, its key, its record, its count."""

from __future__ import annotations

import logging
import secrets
from typing import Final, final

from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.serve.api_errors import ApiError
from trainer.serve.control import Control, places_of, recorded_action

LEFT: Final = 499
"""Status, in the counters, of a request whose client left before the response began."""

LOG: Final = logging.getLogger("uvicorn.error")


@final
class Guard:
    """Middleware that adds one call to each part of a stream, and no task."""

    def __init__(self, app: ASGIApp, requests: Counter, control: Control) -> None:
        """Wrap an application.

        Args:
            app: the application.
            requests: counter by route and status.
            control: decides and records.
        """
        self._app, self._requests, self._control = app, requests, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = LEFT
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", request_id.encode()), *scope["state"].get("headers", ())]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            scope.setdefault("state", {})
            request = Request(scope)
            principal = await self._control.access.principal(request)
            scope["state"]["principal"] = principal
            action = recorded_action(scope["method"], scope["path"])
            if action is None:
                await self._app(scope, receive, send_on)
            else:
                await self._recorded(action, request, receive, send_on)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, headers=error.headers())(scope, receive, send_on)
        except Exception as error:  # the text of an exception may hold a part of the request
            LOG.error("request %s: %s", request_id, places_of(error))
            if status != LEFT:
                raise  # the response has begun
            found = ApiError(500, f"the server failed ({type(error).__name__}); its log has the details")
            await JSONResponse(found.body(), found.status)(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._requests.labels(route, status).inc()

    async def _recorded(self, action: str, request: Request, receive: Receive, send: Send) -> None:
        """Record a control action before it begins, and how it ended before the client is told.

        Raises:
            ApiError: the record cannot be kept; nothing was sent.
        """
        record, target = self._control.recorder.record, f"{request.method} {request.scope['path']}"
        await record(request, f"{action}.begin", target, {})
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        try:
            await self._app(request.scope, receive, hold)
        finally:
            status = next((each["status"] for each in held if each["type"] == "http.response.start"), None)
            await record(request, f"{action}.end", target, {"status": status})
        for message in held:
            await send(message)


def _request_id(given: str) -> str:
    """The client's own id where it is a printable one, or a new one."""
    is_usable = given.isascii() and 0 < len(given) <= 128 and given.isprintable()
    return given if is_usable else secrets.token_hex(8)
