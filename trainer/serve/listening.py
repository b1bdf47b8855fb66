"""uvicorn as both servers run it: one model's gateway, and that of deployments."""

from __future__ import annotations

import argparse
import logging

import uvicorn
from fastapi import FastAPI

from trainer.serve.control import WithoutContent
from trainer.serve.tls import tls_settings


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


def address(arguments: argparse.Namespace) -> str:
    """Scheme, host and port that clients use."""
    scheme = "http" if arguments.tls_cert is None else "https"
    return f"{scheme}://{arguments.host}:{arguments.port}"
