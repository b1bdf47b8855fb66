"""An HTTP client for servers in the user's own network."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx


def direct_client(socket: Path | None = None, *, use_proxies: bool = False) -> httpx.Client:
    """A client that ignores proxies and other settings of the environment; safe to share between threads.

    It opens one connection per request: a server that restarts closes idle connections, and a request on a closed one
    fails. Certificates are verified against those of the system.

    Args:
        socket: a Unix socket that it connects to, whatever the host of a URL; None connects by TCP.
        use_proxies: use the environment's proxies after all, for a server outside.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    if socket is not None:
        return httpx.Client(trust_env=False, transport=httpx.HTTPTransport(uds=str(socket), limits=limits))
    context = ssl.create_default_context()
    return httpx.Client(trust_env=use_proxies, verify=context, follow_redirects=True, limits=limits)
