"""A headless Chromium, driven by the DevTools protocol over two pipes, so that nothing else has to be installed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import IO, Any, Self, cast

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ANSWER_SECONDS = 30.0
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # the page is our own, and CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Return the program, or None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page; what the page logs, throws or is refused is kept in `complaints`."""

    def __init__(self) -> None:
        program = find_chromium()
        if program is None:
            pytest.skip(f"no Chromium here: none of {', '.join(_NAMES)} is on the PATH (apt-get install chromium)")
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        # The protocol is spoken on descriptors 3 and 4, which are our ends of stdin and stdout.
        command = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self._popen = subprocess.Popen(
            ["/bin/sh", "-c", command, program, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._in = cast("IO[bytes]", self._popen.stdin)
        self._out = cast("IO[bytes]", self._popen.stdout)
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requested: list[str] = []
        """The addresses that the page has asked for."""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._in.write(json.dumps(message).encode() + b"\0")
        self._in.flush()
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._received:
            left = deadline - time.monotonic()
            assert left > 0, f"Chromium did not answer {method}"
            if select.select([self._out], [], [], left)[0]:
                chunk = self._out.read1(1 << 16)  # type: ignore[attr-defined]
                assert chunk, f"Chromium ended at {method}"
                self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        self._note(decoded)
        return decoded

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"])[:2000])
            case "Runtime.consoleAPICalled" if parameters["type"] in {"error", "warning", "assert"}:
                self.complaints.append(json.dumps(parameters["args"])[:2000])
            case "Log.entryAdded" if parameters["entry"]["level"] in {"error", "warning"}:
                self.complaints.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            case "Page.javascriptDialogOpening":
                self.complaints.append(f"a dialog opened: {parameters['message']}")

    def open(self, url: str) -> None:
        """Go to an address; returns before it is loaded."""
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return what an expression of JavaScript gives, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str, within: float = 20.0) -> Any:
        """Return the first true value of an expression, or fail at the deadline."""
        deadline = time.monotonic() + within
        while not (value := self.run(f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()")):
            if time.monotonic() > deadline:
                pytest.fail(f"{script} did not become true within {within:g} s; the page: {self.text()[:3000]}")
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """Return what the page shows as text."""
        return str(self.run("document.body.innerText"))

    def click(self, selector: str) -> None:
        """Click on an element as a person does, by the mouse, once it is to be seen and has come to rest."""
        x, y = self.run(
            "(async () => { let before; for (let frames = 0; frames < 600; frames++) {"
            f" const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); await new Promise(requestAnimationFrame);"
            " const r = e.getBoundingClientRect(); const place = [r.x + r.width / 2, r.y + r.height / 2];"
            " if (String(place) === before && e.contains(document.elementFromPoint(...place))) return place;"
            " before = String(place); } throw new Error('nobody can click on it'); })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key by its DOM name, such as Tab or Enter."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        extra = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            down = extra if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **down)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, **features: str) -> None:
        """Let media queries find these preferences, such as color_scheme="dark"."""
        asked = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=asked)

    def picture(self) -> bytes:
        """Return what is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the browser and remove its profile."""
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._in.close()
        self._out.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
