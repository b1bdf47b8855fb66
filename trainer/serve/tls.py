"""TLS by files, and which proxies are believed."""

from __future__ import annotations

import argparse
import ssl
from typing import Any

from trainer.errors import UserError


def tls_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of uvicorn for TLS and for proxies in front.

    Raises:
        UserError: half of a certificate, or a file that cannot be read.
    """
    settings: dict[str, Any] = {"proxy_headers": False}
    if arguments.trusted_proxy:
        # X-Forwarded-For and X-Forwarded-Proto of these addresses, and of no others, are believed
        settings = {"proxy_headers": True, "forwarded_allow_ips": arguments.trusted_proxy}
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise UserError("--tls-cert and --tls-key go together: the certificate's chain and its private key, as PEM")
    if arguments.tls_cert is None:
        return settings
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(arguments.tls_cert, arguments.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--tls-cert {arguments.tls_cert} --tls-key {arguments.tls_key}: {error}") from None
    return {**settings, "ssl_certfile": arguments.tls_cert, "ssl_keyfile": arguments.tls_key}
