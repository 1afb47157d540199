"""The gate alone, in front of a small ASGI app: what it refuses, in which order, and what it leaves untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import translate
from serving.gate import CHANGING, DRAINING, Admission, Gate
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
    gate = Gate(echo, config(body_deadline_seconds=1.0, admission_limit=1), token="")

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
    gate = Gate(slow_app, config(admission_limit=1, queue_ms=0.0, queue_calm_ms=1.0), token="")

    async def work() -> Any:
        await call(gate)
        first = await asyncio.gather(*(call(gate) for _ in range(5)))
        return first, await call(gate)

    answers, later = run(work)
    assert sorted(status for status, *_ in answers) == [200, 200, 429, 429, 429] and later[0] == 200
    refused = next(answer for answer in answers if answer[0] == 429)
    assert refused[1]["retry-after"] == "1" and error(refused[2])["code"] == "overloaded"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def worked(admission: Admission, clock: Clock, seconds: float, times: int = 100) -> None:
    """Requests one after the other, each so long in work."""
    for _ in range(times):
        entered = await admission.enter()
        assert entered is not None
        clock.now += seconds
        admission.leave(entered)


def test_a_burst_waits_in_order_and_a_refusal_ends_the_waiting_until_it_is_calm() -> None:
    clock = Clock()
    admission = Admission(limit=1, patience_seconds=0.25, calm_seconds=0.4, clock=clock)

    async def work() -> None:
        await worked(admission, clock, 0.1)
        began = clock.now
        first = await admission.enter()
        waiting = [asyncio.create_task(admission.enter()) for _ in range(2)]
        await asyncio.sleep(0)
        assert await admission.enter() is None  # the third would wait 0.3 s
        clock.now += 0.1
        admission.leave(first)
        second = await waiting[0]
        assert second == clock.now and not waiting[1].done()  # in order of arrival
        clock.now = began + 0.3
        assert await admission.enter() is None  # there is room, but it was no burst
        clock.now = began + 0.65
        assert await admission.enter() is None  # a refusal renews the overload
        clock.now = began + 1.1
        later = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        admission.leave(clock.now - 0.1)
        third = await waiting[1]
        admission.leave(third)
        admission.leave(await later)
        assert await admission.enter() is not None  # all slots came back

    run(work)


@pytest.mark.parametrize(("load", "over"), [(0.5, True), (3.0, False)])
def test_overload_ends_soon_at_half_load_and_never_while_it_lasts(load: float, over: bool) -> None:
    """Two slots, 0.1 s of work, Poisson arrivals after a refusal: at half load one in five finds both slots taken, and a refusal alone proves nothing."""
    clock, rng = Clock(), np.random.default_rng(0)
    admission = Admission(limit=2, patience_seconds=0.2501, calm_seconds=10.0, clock=clock)
    refused: list[float] = []

    async def work() -> None:
        await worked(admission, clock, 0.1)
        busy = [await admission.enter() for _ in range(2)]
        tasks = [asyncio.create_task(admission.enter()) for _ in range(40)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        began, ends = clock.now, [(clock.now + 0.1, entered) for entered in busy]
        for gap in rng.exponential(0.05 / load, 300):
            until = clock.now + gap
            for end, entered in sorted(ends):
                if end <= until:
                    clock.now = end
                    admission.leave(entered)
                    ends.remove((end, entered))
            clock.now = until
            task = asyncio.create_task(admission.enter())
            await asyncio.sleep(0)
            if not task.done():
                task.cancel()  # it may wait
                await asyncio.sleep(0)
            elif task.result() is None:
                refused.append(clock.now)
            else:
                ends.append((clock.now + 0.1, clock.now))
        if over:
            assert 0 < len(refused) < 20 and refused[-1] - began < 4.0
        else:
            assert len(refused) > 150

    run(work)


@pytest.mark.parametrize(("work_seconds", "waiting"), [(0.01, 50), (0.1, 5), (0.2, 2), (0.6, 2), (3.0, 2)])
def test_how_many_may_wait_follows_from_how_long_the_work_takes(work_seconds: float, waiting: int) -> None:
    clock = Clock()
    admission = Admission(limit=2, patience_seconds=0.2501, calm_seconds=0.4, clock=clock)

    async def work() -> None:
        await worked(admission, clock, work_seconds)
        assert None not in [await admission.enter() for _ in range(2)]
        tasks = [asyncio.create_task(admission.enter()) for _ in range(200)]
        await asyncio.sleep(0)
        assert sum(not task.done() for task in tasks) == waiting
        for task in tasks:
            task.cancel()

    run(work)


@pytest.mark.parametrize("overloaded", [False, True])
def test_while_models_change_more_may_wait_unless_there_is_overload(overloaded: bool) -> None:
    clock = Clock()
    admission = Admission(limit=1, patience_seconds=0.2501, calm_seconds=0.4, clock=clock)

    async def waiting(count: int) -> int:
        tasks = [asyncio.create_task(admission.enter()) for _ in range(count)]
        await asyncio.sleep(0)
        found = sum(not task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        return found

    async def work() -> None:
        await worked(admission, clock, 0.1)
        assert await admission.enter() is not None
        if overloaded:
            assert await waiting(3) == 2
        CHANGING.set()
        try:
            assert await waiting(30) == (0 if overloaded else 20)
        finally:
            CHANGING.clear()
        if not overloaded:
            clock.now += 1.0  # the change is done, what waits is not
            assert await waiting(19) == 19
            clock.now += 2.0
            assert await waiting(30) == 2

    run(work)


def test_who_stops_waiting_costs_no_slot() -> None:
    clock = Clock()
    admission = Admission(limit=1, patience_seconds=1.0, calm_seconds=0.4, clock=clock)

    async def work() -> None:
        await worked(admission, clock, 0.01)
        first = await admission.enter()
        assert first is not None
        waiting = [asyncio.create_task(admission.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        admission.leave(first)  # in the same turn as the cancellation: the slot goes to the next
        waiting[1].cancel()  # which was given it and is cancelled before it runs
        third = await asyncio.wait_for(waiting[2], 5)
        assert third is not None
        admission.leave(third)
        assert await admission.enter() is not None and not admission._queue

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
    gate = Gate(echo, config(body_limit_bytes=100, body_budget_bytes=150, body_deadline_seconds=1.5), token="")

    async def work() -> Any:
        waiting = asyncio.create_task(call(gate, JSON | {"content-length": "100"}, parts=[b"{}"], pause=9.0))
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
