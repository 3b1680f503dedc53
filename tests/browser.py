"""A real browser for the tests of pages, driven over a pipe by Chromium's own protocol; no library, no port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The protocol's pipe is file descriptors 3 and 4 of the browser.
_EXEC = "import os, sys; read, write, *command = sys.argv[1:]; "
_EXEC += "os.dup2(int(read), 3); os.dup2(int(write), 4); os.execv(command[0], command)"


class Navigated(Exception):
    """A page was asked while another one took its place."""


class Browser:
    """Chromium without a window and without a network: every host name is unknown to it."""

    def __init__(self, program: str, profile: Path):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [
            program, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-dev-shm-usage",
            *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        shim = [sys.executable, "-c", _EXEC, str(to_browser), str(from_browser), *command]
        self._process = subprocess.Popen(shim, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._unread, self._calls, self._events = b"", 0, list[dict[str, Any]]()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """One command of the protocol; what happens meanwhile is kept as events."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser ended"
            self._unread += piece
        line, self._unread = self._unread.split(b"\0", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def open(self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> Tab:
        """A new tab with this page, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable", session)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.call("Page.navigate", session, url=page.as_uri())
        tab.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab

    def events(self, session: str) -> list[dict[str, Any]]:
        """What has happened in a tab so far."""
        return [event for event in self._events if event.get("sessionId") == session]

    def close(self) -> None:
        """Ends the browser."""
        self.call("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)


class Tab:
    """One page in the browser."""

    def __init__(self, browser: Browser, session: str):
        self.browser = browser
        self.session = session

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.browser.call("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60.0) -> None:
        """Until the expression is true; fails when it does not become so."""
        deadline = time.monotonic() + seconds
        while not self._is_true(condition):
            assert time.monotonic() < deadline, f"never true: {condition}; {self.complaints()}"
            time.sleep(0.05)

    def _is_true(self, condition: str) -> bool:
        """Of the page that is there; of one that is just being left nothing is."""
        try:
            return bool(self.ask(condition))
        except Navigated:
            return False

    def complaints(self) -> list[str]:
        """Every error and warning of the console, and every uncaught exception."""
        self.ask("0")  # reads the events that are under way
        found = []
        for event in self.browser.events(self.session):
            what, told = event["method"], event["params"]
            if what == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
            elif what == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            elif what == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
        return found

    def requests(self) -> list[str]:
        """The address of everything that the page asked for, itself included."""
        events = self.browser.events(self.session)
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
