"""Tools of an MCP server that speaks over stdio (Model Context Protocol), by the official client; extra `mcp`.

A server belongs to one rollout: the rollout's process starts it, under its own memory limit, and ends it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from trainer.environments.tools import Tool, described_tool
from trainer.errors import RewardError

LEASH: Final = Path(__file__).with_name("leash.py")
REMEDY: Final = 'the package `mcp` is not installed; pip install "tunesmith[mcp]"'


@final
@dataclass(frozen=True)
class McpSettings:
    """How a server is started."""

    command: tuple[str, ...]
    only: tuple[str, ...] = ()
    """Tools that are offered; all if empty."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables, in addition to HOME, PATH and the like."""

    @classmethod
    def of(cls, wire: Mapping[str, Any]) -> McpSettings:
        """Read back from JSON."""
        return cls(tuple(wire["command"]), tuple(wire["only"]), dict(wire["variables"]))

    @property
    def shown(self) -> str:
        """The command, for messages."""
        return " ".join(self.command)


@final
class ToolServers:
    """The servers of one rollout."""

    def __init__(self, settings: Sequence[McpSettings], base_dir: Path) -> None:
        """Start none yet.

        Args:
            settings: of each server.
            base_dir: directory of the recipe.
        """
        self._settings, self._base_dir = settings, base_dir
        self._running: list[McpServer] = []

    def start(self) -> list[Tool]:
        """Start them; returns their tools.

        Raises:
            RewardError: one does not start.
        """
        for each in self._settings:
            self._running.append(McpServer(each, self._base_dir))
        return [tool for server in self._running for tool in server.tools]

    def close(self) -> None:
        """End them."""
        while self._running:
            self._running.pop().close()


@final
class McpServer:
    """A running server; one call at a time."""

    def __init__(self, settings: McpSettings, base_dir: Path) -> None:
        """Start it and ask for its tools.

        Args:
            settings: how it is started.
            base_dir: its working directory, that of the recipe.

        Raises:
            RewardError: the package `mcp` is missing, the server does not start, or it lacks a tool.
        """
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import ClientSession, StdioServerParameters, stdio_client
        except ImportError:
            raise RewardError(f"tool server {settings.shown}: {REMEDY}") from None
        self._shown = settings.shown
        argv = ["-I", str(LEASH), str(os.getpid()), *settings.command]
        parameters = StdioServerParameters(
            command=sys.executable, args=argv, env=dict(settings.variables), cwd=str(base_dir)
        )
        self._stack = ExitStack()
        try:
            self._portal = self._stack.enter_context(start_blocking_portal())
            wrap = self._portal.wrap_async_context_manager
            streams = self._stack.enter_context(wrap(stdio_client(parameters, sys.__stderr__ or sys.stderr)))
            self._session = self._stack.enter_context(wrap(ClientSession(*streams)))
            self._portal.call(self._session.initialize)
            self.tools = self._listed(settings.only)
        except RewardError:
            self._stack.close()
            raise
        except Exception as error:
            self._stack.close()
            raise RewardError(f"tool server {self._shown} did not start: {type(error).__name__}: {error}") from None

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What a tool returns, as text for the policy.

        Args:
            name: of the tool.
            arguments: of the call, checked against its schema.

        Raises:
            RuntimeError: the server has ended, or returned what is no text.
        """
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        try:
            result = self._portal.call(self._session.call_tool, name, dict(arguments))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise RuntimeError(f"tool server {self._shown} has ended") from None
            return f"error: {error.message}"
        texts = [getattr(block, "text", None) for block in result.content]
        if any(text is None for text in texts):
            kinds = sorted({block.type for block in result.content} - {"text"})
            raise RuntimeError(f"tool {name} of {self._shown} returned {', '.join(kinds)}; only text can be used")
        if not texts and result.structured_content is not None:
            texts = [json.dumps(result.structured_content, ensure_ascii=False)]
        text = "\n".join(map(str, texts))
        return f"error: {text}" if result.is_error else text

    def close(self) -> None:
        """End the server: close its input, then signal it."""
        self._stack.close()

    def _listed(self, only: Sequence[str]) -> list[Tool]:
        from mcp_types import PaginatedRequestParams

        found, cursor = [], None
        while True:
            page = self._portal.call(
                lambda params: self._session.list_tools(params=params), PaginatedRequestParams(cursor=cursor)
            )
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        by_name = {tool.name: tool for tool in found}
        missing = [name for name in only if name not in by_name]
        if missing or not by_name:
            has = ", ".join(by_name) or "none"
            raise RewardError(f"tool server {self._shown} has no tool {', '.join(missing) or 'at all'}; it has {has}")
        return [self._tool(by_name[name]) for name in (only or by_name)]

    def _tool(self, listed: Any) -> Tool:
        described = {
            "name": listed.name,
            "description": listed.description or "",
            "parameters": dict(listed.input_schema),
        }
        return described_tool(described, lambda arguments: self.call(listed.name, arguments))
