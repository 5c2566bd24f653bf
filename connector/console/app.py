"""The console's addresses: the page itself, what it shows as JSON, and the few things that it may do."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, Final

import psycopg
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from connector.console.guard import Guard, is_authorized
from connector.console.questions import MOST_ROWS, Busy, Questions
from connector.console.sampler import INTERVAL_SECONDS, KEPT_SECONDS, Numbered, Sampler
from connector.errors import ConnectorError
from connector.kafka import KafkaException
from connector.observability.health import Health
from connector.observability.logs import get_logger, redact
from connector.ops.latest_letters import MOST_LETTERS
from connector.ops.status import as_document, told
from connector.store.redrives import Place

_MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_LONGEST_QUERY: Final = 1_000
_LONGEST_BODY: Final = 64 << 10
_WRONG_TOKEN_SECONDS: Final = 1.0
_HIGHEST_ID: Final = (1 << 63) - 1
_HIGHEST_PLACE: Final = Place(partition=(1 << 31) - 1, offset=_HIGHEST_ID, time=_HIGHEST_ID)

_log = get_logger("console")


class Json(Response):
    """An answer in JSON. Ids are text in it, since a browser's numbers end at 2⁵³."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the content; a number that is none is null."""
        return json.dumps(_plain(content), ensure_ascii=False, allow_nan=False).encode()


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is anything
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {
            name: str(item) if isinstance(item, int) and (name == "id" or name.endswith("_id")) else _plain(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def make_app(
    sampler: Sampler, questions: Questions, health: Health, token: str, operator: str, *, local_only: bool
) -> ASGIApp:
    """Return the application; without a token nothing can be changed by it, with one by `operator`."""
    pages = _Pages(sampler, questions, token, operator)
    routes = [
        *_static(),
        Route("/livez", lambda _: _verdict(health.liveness())),
        Route("/readyz", lambda _: _verdict(health.readiness())),
        Route("/api/pipeline", pages.pipeline),
        Route("/api/messages", pages.of_key),
        Route("/api/messages/{id}", pages.life),
        Route("/api/messages/{id}/copies", pages.copies),
        Route("/api/conversations", pages.of_conversation),
        Route("/api/dead", pages.dead),
        Route("/api/dead/rows", pages.dead_rows),
        Route("/api/letters", pages.letters),
        Route("/api/letters/redrive", pages.redrive_letters, methods=["POST"]),
        Route("/api/proof", pages.last_proof),
        Route("/api/proof", pages.prove, methods=["POST"]),
        Route("/api/redrive", pages.redrive, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _refused,
            psycopg.Error: _database_failed,
            KafkaException: _kafka_failed,
            ConnectorError: _service_failed,
            Busy: _busy,
            Exception: _defect,
        },
    )
    return Guard(app, local_only=local_only)


def _static() -> Iterator[Route]:
    for file in files("connector.console").joinpath("static").iterdir():
        page = partial(_file, file.read_bytes(), _MEDIA_TYPES[file.name[file.name.rindex(".") :]])
        yield Route("/" if file.name == "index.html" else f"/{file.name}", page)


def _file(content: bytes, media_type: str, _: Request) -> Response:
    return Response(content, media_type=media_type)


def _verdict(verdict: tuple[bool, dict[str, str]]) -> Response:
    good, parts = verdict
    return Json({"ok": good, "parts": {part: redact(text) for part, text in parts.items()}}, 200 if good else 503)


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Json({"error": error.detail}, error.status_code, headers=error.headers)


def _database_failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, psycopg.Error)
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        remedy = "let its role be a member of outbox_auditor, and of outbox_operator to redrive"
        return Json({"error": redact(f"{told(error)}: {remedy}")}, 403)
    return Json({"error": redact(told(error))}, 503)


def _kafka_failed(_: Request, error: Exception) -> Response:
    return Json({"error": redact(f"Kafka: {error.args[0].str()}")}, 503)


def _service_failed(_: Request, error: Exception) -> Response:
    return Json({"error": redact(str(error))}, 503)


def _busy(_: Request, _error: Exception) -> Response:
    return Json({"error": "several questions are still being answered; ask again in a few seconds"}, 503)


def _defect(_: Request, _error: Exception) -> Response:
    # Starlette passes it on to uvicorn, which logs it.
    return Json({"error": "the console failed to answer; its log tells why"}, 500)


class _Pages:
    """The answers under /api."""

    def __init__(self, sampler: Sampler, questions: Questions, token: str, operator: str) -> None:
        self._sampler = sampler
        self._questions = questions
        self._token = token
        self._operator = operator

    def pipeline(self, request: Request) -> Response:
        looks = self._sampler.since(_number(request, "after") or 0)
        latest = self._sampler.since(0)[-1:]
        return Json(
            {
                "interval": INTERVAL_SECONDS,
                "kept": KEPT_SECONDS,
                "writable": bool(self._token),
                "number": latest[0].number if latest else 0,
                "now": _now(latest[0]) if latest else None,
                "points": [_point(numbered) for numbered in looks],
            }
        )

    def of_key(self, request: Request) -> Response:
        return Json(self._questions.of_key(_text(request, "key"), _number(request, "before")))

    def of_conversation(self, request: Request) -> Response:
        return Json(self._questions.of_conversation(_text(request, "chat_id"), _number(request, "before")))

    def life(self, request: Request) -> Response:
        outbox_id = _id(request.path_params["id"])
        life = self._questions.life(outbox_id)
        if life is None:
            raise HTTPException(404, f"there is no message {outbox_id} in the outbox or in history")
        return Json(life)

    def copies(self, request: Request) -> Response:
        outbox_id = _id(request.path_params["id"])
        copies = self._questions.copies(outbox_id)
        if copies is None:
            raise HTTPException(404, f"there is no message {outbox_id} in the outbox")
        return Json(copies)

    def dead(self, _: Request) -> Response:
        return Json({"groups": self._questions.dead_by_reason()})

    def dead_rows(self, request: Request) -> Response:
        reason = request.query_params.get("reason", "")[:_LONGEST_QUERY]
        return Json({"rows": self._questions.dead_of_reason(reason, _text(request, "biz_type"))})

    def letters(self, _: Request) -> Response:
        return Json(self._questions.letters())

    def last_proof(self, _: Request) -> Response:
        return Json({"proof": self._questions.last_proof, "recorded": self._questions.recorded_proofs()})

    async def prove(self, request: Request) -> Response:
        # No other site can make a browser say that it sends JSON.
        await _body(request)
        return Json({"proof": await run_in_threadpool(self._questions.prove)})

    async def redrive(self, request: Request) -> Response:
        await self._authorize(request)
        body = await _body(request)
        ids, reason, by = [_id(str(each)) for each in _listed(body, "ids", MOST_ROWS)], _reason(body), self._by(request)
        moved = await run_in_threadpool(self._questions.redrive, ids, by, reason)
        _log.warning("redriven_from_console", asked=len(ids), moved=moved, by=by, reason=reason)
        return Json({"moved": moved})

    async def redrive_letters(self, request: Request) -> Response:
        await self._authorize(request)
        body = await _body(request)
        places = [_place(each) for each in _listed(body, "letters", MOST_LETTERS)]
        reason, by = _reason(body), self._by(request)
        moved = await run_in_threadpool(self._questions.redrive_letters, places, by, reason)
        _log.warning("letters_redriven_from_console", asked=len(places), moved=moved, by=by, reason=reason)
        return Json({"moved": moved})

    def _by(self, request: Request) -> str:
        client = request.client.host if request.client else "an unknown address"
        return f"{self._operator}, console, for {client}"

    async def _authorize(self, request: Request) -> None:
        """Let pass whoever shows the token, in a header that no other site can make a browser send."""
        if not self._token:
            raise HTTPException(403, "this console is read-only: CONNECTOR_CONSOLE_TOKEN is not set")
        if not is_authorized(request.headers.get("authorization"), self._token):
            await asyncio.sleep(_WRONG_TOKEN_SECONDS)
            _log.warning("console_token_refused", client=request.client.host if request.client else None)
            raise HTTPException(401, "that is not the token", {"WWW-Authenticate": "Bearer"})


async def _body(request: Request) -> Any:  # noqa: ANN401 - JSON is anything
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be JSON, and say so")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY:
            raise HTTPException(413, f"the body is longer than {_LONGEST_BODY} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is no JSON") from None


def _listed(body: Any, name: str, most: int) -> list[Any]:  # noqa: ANN401 - JSON is anything
    listed = body.get(name) if isinstance(body, dict) else None
    if not isinstance(listed, list) or not 0 < len(listed) <= most:
        raise HTTPException(400, f"`{name}` must be a list of 1 to {most}")
    return listed


def _place(letter: Any) -> Place:  # noqa: ANN401 - JSON is anything
    numbers = letter if isinstance(letter, list) else []
    if len(numbers) != len(Place._fields) or not all(
        type(number) is int and 0 <= number <= most for number, most in zip(numbers, _HIGHEST_PLACE, strict=True)
    ):
        raise HTTPException(400, "a letter is a list of its partition, its offset and its time in milliseconds")
    return Place(*numbers)


def _reason(body: Any) -> str | None:  # noqa: ANN401 - JSON is anything
    reason = body.get("reason") or None
    if reason is not None and not (isinstance(reason, str) and len(reason) <= _LONGEST_QUERY and _is_storable(reason)):
        raise HTTPException(400, f"`reason` must be a text of at most {_LONGEST_QUERY} characters without NUL")
    return reason


def _is_storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _text(request: Request, name: str) -> str:
    text = request.query_params.get(name, "")
    if not text or len(text) > _LONGEST_QUERY or not _is_storable(text):
        raise HTTPException(400, f"`{name}` must be a text of 1 to {_LONGEST_QUERY} characters without NUL")
    return text


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    return None if text is None else _id(text)


def _id(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(_HIGHEST_ID)) or int(text) > _HIGHEST_ID:
        raise HTTPException(400, f"an id is a whole number from 0 to {_HIGHEST_ID}")
    return int(text)


def _now(numbered: Numbered) -> dict[str, Any]:
    look = numbered.look
    return {
        **as_document(look.snapshot),
        "at": look.at,
        "problems": look.problems,
        "enqueued": look.enqueued,
        "published": look.published,
        "stored": look.stored,
        "retries": look.retries,
        "latency": look.latency,
        "deaths": look.deaths,
    }


def _point(numbered: Numbered) -> list[float | None]:
    """Return what the charts draw of one look, in their order."""
    look = numbered.look
    slot, latency, rows = look.snapshot.slot, look.latency, look.snapshot.outbox
    return [
        look.at,
        look.enqueued,
        look.published,
        look.stored,
        None if rows is None else rows["pending"],
        look.snapshot.consumer.lag,
        None if slot is None else slot.lag_bytes,
        None if latency is None else latency.p50,
        None if latency is None else latency.p99,
    ]
