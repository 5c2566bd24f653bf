"""A console that runs for a test, asked over HTTP as its page asks it."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any

from tests.services.eventually import eventually
from tests.services.process import Process

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - a test's own


@dataclass(frozen=True, slots=True)
class Answer:
    """What the console answered."""

    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        """Return the body, decoded."""
        return json.loads(self.text)


class Console:
    """A running console."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.port: int = process.wait_for_log("http_listening")["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        """Ask for a path; a body that is no bytes is sent as JSON, and keyword arguments are headers."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read().decode())
        finally:
            connection.close()

    def post(self, path: str, body: Any, token: str | None = TOKEN, **headers: str) -> Answer:
        """Send a body, with the token unless it is None."""
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return self.ask(path, method="POST", body=body, **headers)

    def now(self) -> Any:
        """Return the latest look at the pipeline, once there is one."""
        return eventually(lambda: self.ask("/api/pipeline").json()["now"], within=30, what="a first look")
