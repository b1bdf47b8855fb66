"""uvicorn as both servers run it: one model's gateway, and that of deployments."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from trainer.errors import UserError
from trainer.serve.control import WithoutContent
from trainer.serve.tls import tls_settings

if TYPE_CHECKING:
    from trainer.serve.traces import Traces


def make_server(app: FastAPI, arguments: argparse.Namespace) -> uvicorn.Server:
    """A server that is not started yet; its log has no content of requests.

    Args:
        app: answers.
        arguments: address, TLS, proxies, and how long a stop waits for requests in flight.
    """
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
    return uvicorn.Server(config)


def traces_of(arguments: argparse.Namespace) -> Traces | None:
    """What `--traces` asks for; None without it, and nothing of OpenTelemetry is imported.

    Raises:
        UserError: the exporter is not installed.
    """
    if arguments.traces is None:
        return None
    try:
        from trainer.serve.traces import open_traces

        return open_traces(arguments.traces)
    except ModuleNotFoundError as error:
        raise UserError(f"--traces {arguments.traces} needs {error.name}: pip install 'tunesmith[otel]'") from None


def address(arguments: argparse.Namespace) -> str:
    """Scheme, host and port that clients use."""
    scheme = "http" if arguments.tls_cert is None else "https"
    return f"{scheme}://{arguments.host}:{arguments.port}"
