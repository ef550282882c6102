"""Chromium for tests, driven through its own protocol over two pipes: no package, no port, no network.

with Browser(profile) as browser:
    browser.open(url, width=390, height=800, dark=True)
    browser.evaluate("document.title")
    browser.screenshot(path)
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import json
import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

OVERFLOW = """(() => {
  const wide = [];
  document.querySelectorAll("body *").forEach(e => {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || e.closest(".scroll, .strip, .store, svg, pre, dialog:not([open])")) return;
    if (box.right > innerWidth + 1 || box.left < -1) wide.push(e.tagName + "." + e.className);
  });
  return {inner: innerWidth, scroll: document.documentElement.scrollWidth, wide};
})()"""
"""How wide the page is, and the elements that stick out of the window."""


class Browser:
    """One headless Chromium with one page. `console` lists what pages logged as errors, refusals by their policy and
    uncaught exceptions included. flags: of Chromium, in the place of `--disable-gpu`."""

    def __init__(self, profile: Path, wait: float = 240.0, flags: Sequence[str] = ()) -> None:
        assert CHROMIUM is not None
        self.wait = wait
        self.console: list[str] = []
        self._seen: list[dict[str, Any]] = []
        self._number = 0
        self._rest = b""
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        flags = [*(flags or ["--disable-gpu"]), "--headless", "--no-sandbox", "--disable-dev-shm-usage"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        flags += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs_in, theirs_out)]  # clear of 3 and 4
        silent = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip([silent, silent, *high], (1, 2, 3, 4))]
        self._process = os.posix_spawn(CHROMIUM, [CHROMIUM, *flags], os.environ, file_actions=actions)
        for end in (theirs_in, theirs_out, silent, *high):
            os.close(end)
        self._in, self._out = ours_in, ours_out
        targets = self._call("Target.getTargets", session=None)["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self._call("Target.attachToTarget", session=None, targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # Chromium leaves when its pipe is closed
        deadline = time.monotonic() + 10
        while os.waitpid(self._process, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
                break
            time.sleep(0.02)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the DevTools protocol on the page."""
        return self._call(method, session=self._session, **parameters)

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a page and wait until everything on it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # as on a phone
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.after(lambda: self.call("Page.navigate", url=url))

    def after(self, action: Any) -> None:
        """Do something that loads another page, and wait for that page."""
        self._seen.clear()
        action()
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self._seen))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (a promise is awaited)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + self.wait
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def choose(self, selector: str, *paths: Path) -> None:
        """Give files to an <input type="file">."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, of all of it or of the window."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))

    def _call(self, method: str, session: str | None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        found: list[dict[str, Any]] = []
        self._until(lambda: found, lambda answer: found.append(answer) if answer.get("id") == number else None)
        assert "error" not in found[0], f"{method}: {found[0].get('error')}"
        return found[0]["result"]

    def _until(self, done: Any, listen: Any = lambda message: None) -> None:
        deadline = time.monotonic() + self.wait
        while not done():
            readable, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "Chromium does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium is gone"
            *messages, self._rest = (self._rest + data).split(b"\0")
            for text in messages:
                message = json.loads(text)
                self._note(message)
                listen(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, facts = message.get("method"), message.get("params", {})
        if method is None:
            return
        self._seen.append(message)
        if method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(facts["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.console.append(f"{facts['entry']['text']} {facts['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.console.append(json.dumps(facts["args"])[:500])


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder as any static host does, without lines on the terminal; `asked` lists what was asked for."""

    def __init__(self, *arguments: Any, asked: list[str], **settings: Any) -> None:
        self.asked = asked
        super().__init__(*arguments, **settings)

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of `folder` on this machine, and the paths that were asked for so far."""
    asked: list[str] = []
    handler = functools.partial(Quiet, directory=str(folder), asked=asked)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://localhost:{server.server_port}/", asked
        server.shutdown()
