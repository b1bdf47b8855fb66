"""An HTTP client for servers in the user's own network."""

from __future__ import annotations

import ssl

import httpx


def direct_client(*, use_proxies: bool = False) -> httpx.Client:
    """A client that ignores proxies and other settings of the environment; safe to share between threads.

    It opens one connection per request: a server that restarts closes idle connections, and a request on a closed one
    fails. Certificates are verified against those of the system.

    Args:
        use_proxies: use the environment's proxies after all, for a server outside.
    """
    return httpx.Client(
        trust_env=use_proxies,
        verify=ssl.create_default_context(),
        follow_redirects=True,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )
