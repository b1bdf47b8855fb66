"""The harness of verifiers that plays our rollouts: a chat loop with the task's tools, in process.

Imported by name as a plug-in of verifiers, in its own interpreter; nothing of the trainer imports it.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any, Final

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult

__all__ = ["ChatHarness"]
NAME: Final = "tunesmith_harness"
"""Under which `verifiers_adapter` registers this module."""


class ChatHarnessConfig(vf.HarnessConfig):  # type: ignore[misc]  # of another interpreter
    """No settings of its own."""


class ChatHarness(vf.Harness[ChatHarnessConfig]):  # type: ignore[misc]
    """Asks the model until it answers without a tool call."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> ProgramResult:
        """Play until the last answer; every model call goes through verifiers' endpoint."""
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            tools, places, connections = await connect_mcp({"mcpServers": servers}, stack)
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
            while True:
                body = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
                headers = {"Authorization": f"Bearer {secret}"}
                response = await client.post(f"{endpoint.rstrip('/')}/chat/completions", json=body, headers=headers)
                if response.is_error:
                    return ProgramResult(1, "", response.text)
                message = response.json()["choices"][0]["message"]
                messages.append({name: value for name, value in message.items() if value is not None})
                if not message.get("tool_calls"):
                    return ProgramResult(0, "", "")
                for call in message["tool_calls"]:
                    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                    text = await call_mcp(connections, places, name, arguments)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": text})
