"""OAUTHBEARER tokens from a file that somebody else keeps fresh."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

TOKEN_FILE: Final = "oauthbearer.token.file"  # noqa: S105 - the option's name
"""An option of our own, as librdkafka takes such tokens from a callback only."""

_OPAQUE_SECONDS: Final = 60.0
"""How long a token serves that does not tell when it expires; the file is then read again."""


class TokenFile:
    """Gives librdkafka a token whenever it wants one (its `oauth_cb`), read anew from the file each time."""

    def __init__(self, path: str) -> None:
        """Remember the file; it is read when a token is wanted."""
        self._path = Path(path)

    def __call__(self, _configuration: str = "") -> tuple[str, float]:
        """Return the token, and when it expires, in seconds since 1970.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no text, or nothing.
        """
        token = self._path.read_text("utf-8").strip()
        if not token:
            raise ValueError("the file holds no token")
        return token, _expiry(token)


def for_librdkafka(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the callback in place of our own option."""
    given = dict(options)
    path = given.pop(TOKEN_FILE, None)
    if path is not None:
        given["oauth_cb"] = TokenFile(str(path))
    return given


def unreadable_token(path: str) -> str | None:
    """Return why there is no token in a file, or None; the file's name may be a secret that was misplaced."""
    try:
        TokenFile(path)()
    except OSError as error:
        return f"the file it names cannot be read ({error.strerror})"
    except ValueError:
        return "the file it names holds no token"
    return None


def without_mechanism(options: Mapping[str, str]) -> str | None:
    """Return what is missing where tokens are given that nobody will ask for, or None."""
    mechanism = options.get("sasl.mechanism", options.get("sasl.mechanisms", ""))
    if mechanism == "OAUTHBEARER":
        return None
    return "a token file is of use with CONNECTOR_KAFKA_SASL_MECHANISM=OAUTHBEARER only: set that too"


def _expiry(token: str) -> float:
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        return time.time() + _OPAQUE_SECONDS
