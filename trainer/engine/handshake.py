"""Two ends of a TCP connection prove to each other that they know a secret, which is not sent. No torch.

    engine -> gateway   N1
    gateway -> engine   N2 PROOF("gateway", N1, N2)
    engine -> gateway   PROOF("engine", N1, N2)

N1 and N2 are 256 random bits, and PROOF is HMAC-SHA-256 of the three words under the secret; all in hexadecimal. What
follows is not encrypted.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from typing import Final

SECRET_VARIABLE: Final = "TRAINER_ENGINE_SECRET"
"""Environment variable of an engine that listens on TCP."""
WORD: Final = 64
"""Length of a number or a proof."""
PATIENCE_S: Final = 10.0


class HandshakeError(Exception):
    """The other end does not know the secret."""


async def prove_engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> None:
    """The engine's part.

    Raises:
        HandshakeError: the client did not prove that it knows the secret.
    """
    first = secrets.token_hex(WORD // 2)
    writer.write(first.encode())
    try:
        async with asyncio.timeout(PATIENCE_S):
            said = (await reader.readexactly(2 * WORD)).decode("ascii", "replace")
    except (TimeoutError, asyncio.IncompleteReadError):
        raise HandshakeError("no proof") from None
    second, proof = said[:WORD], said[WORD:]
    if not _is_equal(proof, _proof(secret, "gateway", first, second)):
        raise HandshakeError("a wrong proof")
    writer.write(_proof(secret, "engine", first, second).encode())


async def prove_gateway(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, patience_s: float
) -> None:
    """The gateway's part.

    Args:
        reader: of the connection.
        writer: of the connection.
        secret: of the replica.
        patience_s: the engine begins when it has loaded its model.

    Raises:
        HandshakeError: it is not the engine that was placed there.
        OSError: the connection broke; TimeoutError is one.
    """
    try:
        async with asyncio.timeout(patience_s):
            first = (await reader.readexactly(WORD)).decode("ascii", "replace")
            second = secrets.token_hex(WORD // 2)
            writer.write((second + _proof(secret, "gateway", first, second)).encode())
            proof = (await reader.readexactly(WORD)).decode("ascii", "replace")
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the engine closed the connection") from None
    if not _is_equal(proof, _proof(secret, "engine", first, second)):
        raise HandshakeError("what answers there is not the engine that was placed")


def _proof(secret: str, who: str, first: str, second: str) -> str:
    return hmac.new(secret.encode(), f"{who} {first} {second}".encode(), hashlib.sha256).hexdigest()


def _is_equal(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(), right.encode())
