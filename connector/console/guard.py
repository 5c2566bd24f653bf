"""Stands in front of every page: who may be asked by which name, and what the browser may do with the answer."""

from __future__ import annotations

import hmac
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})

# Trusted types forbid the page's own script to turn any text into markup.
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses names that are not this machine's where only this machine is served, and adds the headers.

    Without the former a page on the internet could have its own name point to 127.0.0.1, and read what is here.
    """

    def __init__(self, app: ASGIApp, *, local_only: bool) -> None:
        """Guard an application; `local_only` where it listens on a loopback address."""
        self._app = app
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        if self._local_only and _host(Headers(scope=scope).get("host", "")) not in _LOCAL_NAMES:
            answer = PlainTextResponse("this console is served as localhost only: see CONNECTOR_CONSOLE_HOST\n", 421)
            await answer(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)


def _host(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def is_authorized(header: str | None, token: str) -> bool:
    """Tell whether an Authorization header carries the token, in a time that tells nothing about it."""
    scheme, _, given = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
