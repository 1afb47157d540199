"""The gate alone, in front of a small ASGI app: what it refuses, in which order, and what it leaves untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serving.errors import translate
from serving.gate import DRAINING, Admission, Gate
from serving.settings import Arm, ServingConfig

JSON = {"content-type": "application/json"}


def config(**settings: Any) -> ServingConfig:
    return ServingConfig(home=Path("unused"), arms=(Arm(name="a", policy="bootstrap"),), **settings)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def call(app: Any, headers: dict[str, str] | None = None, parts: list[bytes] = [b"{}"], method: str = "POST", path: str = "/v1/rank", pause: float = 0.0) -> Any:  # noqa: B006
    """One request through an ASGI app; returns status, headers, body."""
    if headers is None:
        headers = JSON | {"content-length": str(sum(map(len, parts)))}
    left = list(parts)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.sleep(60)
        await asyncio.sleep(pause)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    await app(scope, receive, send)
    body = b"".join(message["body"] for message in sent[1:])
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, body


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(work())  # type: ignore[arg-type]


def error(body: bytes) -> dict[str, Any]:
    return json.loads(body)["error"]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-length": "2"}, 415, "unsupported_media_type"),
        ({"content-type": "text/plain", "content-length": "2"}, 415, "unsupported_media_type"),
        ({"content-type": "application/vnd.bentoml+pickle", "content-length": "2"}, 415, "unsupported_media_type"),
        ({"content-type": "multipart/form-data; boundary=x", "content-length": "2"}, 415, "unsupported_media_type"),
        (JSON | {"content-length": "2", "content-encoding": "gzip"}, 415, "unsupported_encoding"),
        (JSON, 411, "length_required"),
        (JSON | {"content-length": "2", "transfer-encoding": "chunked"}, 411, "length_required"),
        (JSON | {"content-length": "-1"}, 400, "bad_length"),
        (JSON | {"content-length": "9" * 30}, 400, "bad_length"),
        (JSON | {"content-length": "101"}, 413, "body_too_large"),
        (JSON | {"content-length": "0"}, 400, "empty_body"),
    ],
)
def test_headers_that_are_refused(headers: dict[str, str], status: int, code: str) -> None:
    gate = Gate(echo, config(body_limit_bytes=100), token="")
    parts = [b""] if headers.get("content-length") == "0" else [b"{}"]
    got, sent, body = run(lambda: call(gate, headers, parts))
    assert (got, error(body)["code"]) == (status, code) and sent["content-type"] == "application/json"


def test_a_good_request_passes_untouched() -> None:
    assert run(lambda: call(Gate(echo, config(), token=""), parts=[b'{"a"', b": 1}"]))[::2] == (200, b'{"a": 1}')
    assert run(lambda: call(Gate(echo, config(), token=""), {"content-type": "Application/JSON; charset=utf-8", "content-length": "2"}))[0] == 200
    assert run(lambda: call(Gate(echo, config(), token=""), {}, method="GET"))[0] == 200


def test_the_token_guards_everything_but_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGA_SERVING_TOKEN", "sesame")
    gate = Gate(echo, config())
    good = JSON | {"content-length": "2", "authorization": "Bearer sesame"}
    assert run(lambda: call(gate, good))[0] == 200
    for headers in (JSON | {"content-length": "2"}, good | {"authorization": "Bearer sesam"}, good | {"authorization": "sesame"}):
        status, sent, body = run(lambda headers=headers: call(gate, headers))
        assert status == 401 and sent["www-authenticate"] == "Bearer" and b"sesam" not in body
    assert run(lambda: call(gate, {}, method="GET", path="/metrics"))[0] == 401
    assert run(lambda: call(gate, {}, method="GET", path="/readyz"))[0] == 200


def test_a_slow_body_is_cut_off_and_holds_no_slot() -> None:
    gate = Gate(echo, config(body_deadline_seconds=0.2, admission_limit=1), token="")

    async def work() -> Any:
        slow = [asyncio.create_task(call(gate, parts=[b" ", b"{}"], pause=5.0)) for _ in range(30)]
        await asyncio.sleep(0.05)
        honest = await call(gate)
        return honest[0], [status for status, *_ in await asyncio.gather(*slow)]

    assert run(work) == (200, [408] * 30)


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.2)
    await echo(scope, receive, send)


def test_beyond_the_admission_limit_is_429_at_once() -> None:
    gate = Gate(slow_app, config(admission_limit=2, queue_limit=0, queue_calm_ms=1.0), token="")

    async def work() -> Any:
        first = await asyncio.gather(*(call(gate) for _ in range(5)))
        return first, await call(gate)

    answers, later = run(work)
    assert sorted(status for status, *_ in answers) == [200, 200, 429, 429, 429] and later[0] == 200
    refused = next(answer for answer in answers if answer[0] == 429)
    assert refused[1]["retry-after"] == "1" and error(refused[2])["code"] == "overloaded"


def test_a_burst_waits_and_an_overflow_ends_the_waiting_until_it_is_calm() -> None:
    now = 0.0
    admission = Admission(limit=1, waiting=2, calm_seconds=0.4, clock=lambda: now)

    async def work() -> None:
        nonlocal now
        assert await admission.enter()
        waiting = [asyncio.create_task(admission.enter()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not await admission.enter()  # the queue is full
        admission.leave()
        assert await waiting[0] and not waiting[1].done()  # in order of arrival
        now = 0.3
        assert not await admission.enter()  # there is room, but it was no burst
        now = 0.65
        assert not await admission.enter()  # a refusal renews the overload
        now = 1.1
        later = asyncio.create_task(admission.enter())
        admission.leave()
        assert await waiting[1]
        admission.leave()
        assert await later
        admission.leave()
        assert await admission.enter()  # all slots came back

    run(work)


def test_who_stops_waiting_costs_no_slot() -> None:
    admission = Admission(limit=1, waiting=4, calm_seconds=0.4)

    async def work() -> None:
        assert await admission.enter()
        waiting = [asyncio.create_task(admission.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        admission.leave()  # in the same turn as the cancellation, and the slot of one that was given it and is cancelled
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0.01)
        if not waiting[2].done():
            admission.leave()
        assert await waiting[2]
        admission.leave()
        assert await admission.enter() and not admission._queue

    run(work)


def test_draining_answers_and_closes_each_connection() -> None:
    gate = Gate(echo, config(), token="")
    DRAINING.set()
    try:
        status, headers, body = run(lambda: call(gate))
        assert (status, headers["connection"], body) == (200, "close", b"{}")
        assert run(lambda: call(gate, {}))[1]["connection"] == "close"
    finally:
        DRAINING.clear()
    assert "connection" not in run(lambda: call(gate))[1]


def test_bodies_in_memory_have_a_budget() -> None:
    gate = Gate(echo, config(body_limit_bytes=100, body_budget_bytes=150, body_deadline_seconds=0.3), token="")

    async def work() -> Any:
        waiting = asyncio.create_task(call(gate, JSON | {"content-length": "100"}, parts=[b"{}"], pause=1.0))
        await asyncio.sleep(0.05)
        over = await call(gate, JSON | {"content-length": "90"}, parts=[b"{}"])
        await waiting
        return over[0], (await call(gate, JSON | {"content-length": "90"}, parts=[b"{}"]))[0]

    assert run(work) == (429, 200)


def test_a_client_that_hung_up_is_no_error() -> None:
    async def closed(message: Any) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/v1/rank", "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")]}
    gate = Gate(echo, config(), token="")
    run(lambda: gate(scope, receive, closed))
    assert gate._admission._running == 0


def test_a_slot_is_free_again_after_a_failing_app() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("boom")

    gate = Gate(failing, config(admission_limit=1), token="")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="boom"):
            run(lambda: call(gate))
    assert gate._admission._running == 0 and gate._buffered == 0


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (404, b"Not Found", (404, "not_found", None)),
        (500, b'{"error":"An unexpected error has occurred"}', (500, "internal_error", None)),
        (400, b'[{"error":"x"}]', (400, "bad_request", None)),
        (418, b"", (418, "error", None)),
        (400, b'{"error":"1 validation error","detail":[{"type":"missing","loc":["user_id"],"msg":"Field required"}]}', (422, "invalid_field", "user_id")),
        (400, b'{"error":"x","detail":[{"type":"json_invalid","loc":[],"msg":"Invalid JSON: EOF"}]}', (400, "invalid_json", None)),
        (400, b'{"error":"x","detail":[{"type":"value_error","loc":["events",3,"timestamp","datetime"],"msg":"Value error, no"}]}', (422, "invalid_field", "events.3.timestamp")),
        (409, b'{"error":{"code":"c","message":"m","field":null}}', (409, "c", None)),
    ],
)
def test_every_error_has_one_shape(status: int, body: bytes, expected: tuple) -> None:
    got, translated = translate(status, body)
    shape = error(translated)
    assert (got, shape["code"], shape["field"]) == expected and set(shape) == {"code", "message", "field"} and len(translated) < 500
