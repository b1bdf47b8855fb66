"""A real headless Chromium for tests of pages, driven over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S: Final = 60.0


class Tab:
    """One page, and everything that it logged and asked for."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._next, self._rest = 0, b""
        self._session: str | None = None
        self.complaints: list[str] = []
        """Console errors, uncaught exceptions and violations of the policy."""
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        number = self._next
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        return self._until(lambda each: each.get("id") == number)

    def open(self, url: str, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        """Open a page and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=url)
        self._until(lambda each: each.get("method") == "Page.loadEventFired")
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        params = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **params)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, file: Path, *, is_whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=is_whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def _until(self, is_wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            while b"\0" in self._rest:
                text, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(text)
                self._note(message)
                if is_wanted(message):
                    assert "error" not in message, message["error"]
                    return message.get("result", {})
            if select.select([self._receive], [], [], 1.0)[0]:
                self._rest += os.read(self._receive, 2**20)
        raise AssertionError("Chromium did not answer in time")

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled" if params["type"] in {"error", "warning"}:
                self.complaints.append(str(params["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@contextmanager
def chromium(directory: Path) -> Iterator[Tab]:
    """A browser with a profile of its own, ended with the block."""
    assert CHROMIUM is not None
    to_browser, ours = os.pipe()
    mine, from_browser = os.pipe()

    def take_pipes() -> None:  # the browser reads commands from 3 and answers on 4
        reader, writer = os.dup(to_browser), os.dup(from_browser)
        os.dup2(reader, 3)
        os.dup2(writer, 4)

    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-gpu",
         "--no-first-run", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--remote-debugging-pipe", f"--user-data-dir={directory / 'profile'}"],
        preexec_fn=take_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Tab(ours, mine)
    finally:
        process.terminate()
        process.wait(30)
        os.close(ours)
        os.close(mine)
