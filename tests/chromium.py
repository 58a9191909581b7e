"""A real headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

_START_S, _ANSWER_S = 60, 60
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._last = loop, socket, 0
        self.said: list[str] = []
        """What the console, the log (blocked loads among it) and failed scripts said, and requests to a network."""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), _ANSWER_S)
            if message.get("id") == self._last:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(str(params))
        elif method == "Log.entryAdded":
            self.said.append(str(params["entry"].get("text")))
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.said.append(f"asks for {params['request']['url']}")

    def open(self, file: Path, width: int = 1280, scheme: str = "light") -> None:
        """Show a local file at a width in CSS pixels."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=(url := file.resolve().as_uri()))
        while self.evaluate("[document.readyState, location.href]") != ["complete", url]:
            time.sleep(0.05)

    def evaluate(self, script: str) -> Any:
        """The value of an expression, as JSON carries it."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self) -> NDArray[np.uint8]:
        """(H, W, 3) RGB of what is in view."""
        result = self.call("Page.captureScreenshot", format="png")
        bgr = cv2.imdecode(np.frombuffer(base64.b64decode(result["data"]), np.uint8), cv2.IMREAD_COLOR)
        assert bgr is not None
        return np.asarray(bgr[..., ::-1], np.uint8)


@contextmanager
def a_page(folder: Path) -> Iterator[Page]:
    """A fresh Chromium with its profile in `folder` and one tab; skips the test where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium on this machine: tools/browser.sh installs it")
    profile = folder / "profile"
    with open(folder / "chromium.log", "wb") as log:
        process = subprocess.Popen(
            [binary, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log
        )
    loop = asyncio.new_event_loop()
    try:
        session, socket = loop.run_until_complete(_connect(_port(profile / "DevToolsActivePort", process)))
        try:
            yield Page(loop, socket)
        finally:
            loop.run_until_complete(session.close())
    finally:
        loop.close()
        process.terminate()
        process.wait(30)


async def _connect(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        tab = next(t for t in await answer.json() if t["type"] == "page")
    return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"chromium opened no port in {_START_S} s")
