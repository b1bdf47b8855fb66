"""A tool server for tests, started with `python mcp_server.py`."""

import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("numbers")
CALLS: list[int] = []


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two whole numbers."""
    CALLS.append(a)
    return a + b


@server.tool()
def count() -> str:
    """How often `add` was called in this process, and its id."""
    return f"{len(CALLS)} {os.getpid()}"


@server.tool()
def fail(text: str) -> str:
    """Fails."""
    raise ToolError(text)


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def sleep() -> str:
    """Hang."""
    time.sleep(1000)
    return ""


@server.tool()
def hoard() -> str:
    """Take 3 GiB."""
    return str(len(bytearray(3 << 30)))


@server.tool()
def draw() -> Image:
    """An image."""
    return Image(data=b"png", format="png")


@server.tool()
def variable(name: str) -> str:
    """An environment variable."""
    return os.environ.get(name, "unset")


if __name__ == "__main__":
    print("started", file=sys.stderr)
    server.run("stdio")
