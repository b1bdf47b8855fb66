"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any, final


@final
class ApiError(Exception):
    """A request that is answered with an error.

    Statuses: 400 the client must change the request, 401 no key, 404 no such model or route, 429 too many requests,
    503 the engine is away.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        """Keep what the client is told.

        Args:
            status: of HTTP.
            message: what is wrong, and the remedy.
            param: the field of the request.
            code: a word for programs.
            retry_s: after how many seconds the client may try again.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
