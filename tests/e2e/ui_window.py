"""``finegraft ui`` as its command line starts it, and a browser window on it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line import COMMAND, environment

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
# A browser logs every answer that is no success, also those that the page asked for and shows.
_ANSWERED = "Failed to load resource: the server responded with a status of "


@contextlib.contextmanager
def opened(workspace: Path, **env: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the server over a folder; yields the address that signs in once, and the process."""
    with open(workspace / "ui.log", "w") as log:
        server = subprocess.Popen(
            [*COMMAND, "ui", "--workspace", str(workspace), "--no-open", "--json", "--port", "0"],
            cwd=workspace,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        line = server.stdout.readline()
        assert line, (workspace / "ui.log").read_text()
        yield json.loads(line)["address"], server
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        finally:
            server.kill()
            server.stdout.close()


class Window:
    """A page that is signed in; what it logged and where it went is kept.

    Args:
        browser: Of playwright.
        address: With the token.
        settings: Of the browser's context.
    """

    def __init__(self, browser: Any, address: str, **settings: Any):
        self.url = address.split("#")[0].rstrip("/")
        settings = {"viewport": {"width": 1280, "height": 860}, **settings}
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.logged: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.until("document.querySelector('#where').textContent.includes('finegraft')")

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(f"{_ANSWERED}4"):
            self.logged.append(f"{message.text} {message.location}")

    def until(self, condition: str, seconds: float = 40) -> None:
        """Wait; the page's policy refuses playwright's own waiting, which evaluates text in it."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, (condition, self.page.inner_text("main")[-1500:])
            self.page.wait_for_timeout(20)

    def shows(self, words: str, seconds: float = 40) -> None:
        """Wait until words are to be read in the page."""
        self.until(f"document.body.innerText.includes({json.dumps(words)})", seconds)

    def go(self, address: str) -> None:
        """Open one of the pages, ``#/runs`` say, and wait until it shows its heading."""
        self.page.evaluate("address => { location.hash = address }", address)
        heading = (
            "document.querySelector('main h1') && !document.body.innerText.includes('Reading')"
        )
        self.page.wait_for_timeout(60)  # the hash is told a moment later
        self.until(heading)

    def set(self, **values: object) -> None:
        """Fill fields of the training form."""
        for key, value in values.items():
            self.page.fill(f"[data-key={key}] input", str(value))

    def title(self) -> str:
        """The title of the window, which tells the state."""
        return str(self.page.title())

    def close(self) -> None:
        """Close it, and prove that it logged nothing and asked no other address."""
        self.context.close()
        assert not self.logged, self.logged
        allowed = (f"{self.url}/", "data:")
        outside = [address for address in self.asked if not address.startswith(allowed)]
        assert not outside, outside
