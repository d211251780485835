"""Chromium without a window, spoken to over a pipe: what a page does in a real browser.

    with browser() as tab:  tab.open(file); tab.value("document.title")

The DevTools protocol over two pipes (descriptors 3 and 4 of Chromium): JSON, a zero byte after each
message. Nothing but the standard library is needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# a loaded machine starts a browser slowly
_PATIENCE = 60.0


def executable() -> str | None:
    """Chromium on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page.

    Attributes:
        complaints: errors and warnings of the console, and what scripts raised.
        requests: addresses that were asked for.
    """

    def __init__(self, send: int, receive: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._send, self._session, self._last = send, "", 0
        self._answers: Queue[dict[str, Any]] = Queue()
        self._events: Queue[dict[str, Any]] = Queue()
        threading.Thread(target=self._listen, args=(receive,), daemon=True).start()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _listen(self, receive: int) -> None:
        rest = b""
        while chunk := os.read(receive, 1 << 16):
            *whole, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, whole):
                if "id" in message:
                    self._answers.put(message)
                else:
                    self._note(message["method"], message.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif method == "Page.loadEventFired":
            self._events.put(params)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._answers.get(timeout=_PATIENCE))["id"] != self._last:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, file: Path, anchor: str = "") -> None:
        """Show a file, and wait until it is there."""
        while True:
            try:
                self._events.get_nowait()
            except Empty:
                break
        self.ask("Page.navigate", url=file.as_uri() + anchor)
        self._events.get(timeout=_PATIENCE)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def size(self, width: int, height: int) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def dark(self, on: bool = True) -> None:
        """What the reader prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """A key of the keyboard, down and up."""
        texts = {"Enter": "\r", "Space": " ", "Tab": ""}
        names = {"Space": " "}
        codes = {"Enter": 13, "Space": 32, "Tab": 9}
        given: dict[str, Any] = {
            "key": names.get(key, key), "code": key, "windowsVirtualKeyCode": codes[key],
        }  # fmt: skip
        down = "keyDown" if texts[key] else "rawKeyDown"
        self.ask("Input.dispatchKeyEvent", type=down, text=texts[key], **given)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self, file: Path) -> None:
        """The whole page as a PNG."""
        taken = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


def _pipe() -> tuple[int, int]:
    """A pipe on high descriptors: 3 and 4 of Chromium must not be in the way."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]


@contextmanager
def browser() -> Iterator[Tab]:
    """A fresh Chromium with one page; it ends with the block."""
    found = executable()
    assert found is not None, "ask executable() first"
    (to_it, ours), (theirs, from_it) = _pipe(), _pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            found, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={profile}",
        ]  # fmt: skip
        # Chromium reads descriptor 3 and writes descriptor 4
        shell = f'exec "$@" 3<&{to_it} 4>&{from_it}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        try:
            yield Tab(ours, theirs)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(ours)
