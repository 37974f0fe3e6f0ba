"""A headless Chromium, driven through the DevTools protocol over a pipe, and a server for its pages."""

from __future__ import annotations

import functools
import http.server
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


def chromium() -> str:
    """The browser's path.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise FileNotFoundError(f"needs a browser, one of {', '.join(_NAMES)} (Debian: apt-get install chromium)")
    return found


class Server:
    """Serves a folder on this machine while it is open, and other folders below it by their names."""

    def __init__(self, folder: Path, **others: Path) -> None:
        handler = functools.partial(_Quiet, directory=str(folder), others=others)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".wasm": "application/wasm", ".mjs": "text/javascript",
    }

    def __init__(self, *args: Any, others: Mapping[str, Path], **options: Any) -> None:
        self._others = others
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.lstrip("/").partition("/")
        if first not in self._others:
            return super().translate_path(path)
        kept, self.directory = self.directory, str(self._others[first])
        try:
            return super().translate_path(f"/{rest}")
        finally:
            self.directory = kept

    def end_headers(self) -> None:
        """With a clock of 5 microseconds: pages that are isolated from others have it."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Browser:
    """One page; everything in it ends with the `with` block."""

    def __init__(self, seconds: float = 60.0, before: Sequence[str] = ()) -> None:
        """Seconds: of its whole life. Before: words before the browser's command."""
        self._deadline = time.monotonic() + seconds
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [*before, chromium(), *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]

        def wire() -> None:  # the browser reads from descriptor 3 and writes to 4
            os.dup2(to_read, 30), os.dup2(to_write, 31)
            os.dup2(30, 3), os.dup2(31, 4)

        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=wire, pass_fds=(3, 4), start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._count = 0
        self._session = ""

    def __enter__(self) -> Browser:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.send("Page.navigate", url=url)
        while self.evaluate("location.href + document.readyState") != f"{url}complete":
            time.sleep(0.05)

    def evaluate(self, script: str) -> Any:
        """The value of an expression or of the promise that it gives.

        Raises:
            RuntimeError: it throws.
        """
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", answer))
        return answer["result"].get("value")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise RuntimeError("the browser ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
