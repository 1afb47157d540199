"""ASGI gate in front of the service: refuses what is not worth parsing, before it costs anything.

Order: 401 without the token, 415 unless plain JSON, 411 without a length, 413 above the cap, 429 when too many bodies are
in memory, 408 when the body is late, 400 when it is empty, 429 + Retry-After without a free admission slot; then the app.
The body is complete before a slot is taken, so slow senders hold none. Error answers of the app leave in one JSON shape.
Once DRAINING is set, answers close their connection, so that kept-alive clients go elsewhere instead of being reset.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving import metrics
from serving.errors import error_body, translate
from serving.settings import TOKEN_VARIABLE, ServingConfig, load_settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = {"/livez", "/readyz", "/healthz"}
"""Health probes carry no token."""
_KNOWN_PATHS = {"/v1/rank", "/v1/events"}
_BODILESS = {"GET", "HEAD", "OPTIONS"}
_MOST_WAITING = 128
_NEWEST_SHARE = 0.1
"""Weight of the newest request in the moving averages of time in work and of refusals."""
_OVERLOAD_SHARE = 0.3
"""Share of refusals where two slots without a queue are offered three quarters of what they can do (Erlang's loss formula); below it the overload is over."""
DRAINING = threading.Event()
"""Set on SIGTERM: the service finishes what it has and takes nothing new soon."""
CHANGING = threading.Event()
"""Set while a model is loaded and checked beside the requests, which are then slower for a while; see `Admission`."""
_CHANGE_PATIENCE_SECONDS = 2.0
"""What a wait may be while models change, and for how long afterwards."""
_DRAIN_FACTOR = 16
"""A refused body is read and dropped up to this many times the cap, so that an ordinary client gets to read the refusal."""


class Admission:
    """`limit` requests at once; as many may wait in order, more while their wait is expected to stay below `patience_seconds`. Once one is refused
    nobody waits any more: a burst is absorbed, while in overload what is accepted is answered fast. That ends when `calm_seconds` passed without a refusal, or
    sooner when few of the newest requests were refused: where nobody waits, a service with two slots refuses a fifth even at half its load, and would never see the first.
    The expectation rests on how long requests were in work lately. While models change a service that is not overloaded lets more wait: it is slower for the
    moment, and a swap shall fail nobody."""

    def __init__(self, limit: int, patience_seconds: float, calm_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._patience, self._calm, self._clock = limit, patience_seconds, calm_seconds, clock
        self._running = 0
        self._work_seconds = patience_seconds  # until the first one is known
        self._known = False
        self._queue: deque[asyncio.Future[None]] = deque()
        self._refused_at = -float("inf")
        self._refused_share = 0.0
        """Of the newest requests; 1 at the refusal that begins an overload."""
        self._changed_at = -float("inf")

    async def enter(self) -> float | None:
        """Take a slot, after a wait if need be: the time it was taken, to be given to `leave`; or None: refused."""
        now = self._clock()
        if self._running < self._limit:
            self._refused_share *= 1.0 - _NEWEST_SHARE
            self._running += 1
            metrics.ADMITTED.inc()
            return now
        if CHANGING.is_set():
            self._changed_at = now
        patience = max(self._patience, _CHANGE_PATIENCE_SECONDS) if now - self._changed_at < _CHANGE_PATIENCE_SECONDS else self._patience
        wait = (len(self._queue) + 1) * self._work_seconds / self._limit
        long = wait > patience and len(self._queue) >= self._limit  # one a slot may wait however long the work takes
        overload = now - self._refused_at < self._calm and self._refused_share > _OVERLOAD_SHARE
        if long or len(self._queue) >= _MOST_WAITING or overload:
            self._refused_at, self._refused_share = now, self._refused_share + _NEWEST_SHARE * (1.0 - self._refused_share) if overload else 1.0
            return None
        self._refused_share *= 1.0 - _NEWEST_SHARE
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(slot)
        metrics.QUEUED.inc()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self._pass_on()
            elif slot in self._queue:
                self._queue.remove(slot)
            raise
        finally:
            metrics.QUEUED.dec()
        return self._clock()

    def leave(self, entered: float) -> None:
        """Give the slot back: to who waits longest, if anybody does."""
        self._work_seconds += (_NEWEST_SHARE if self._known else 1.0) * (self._clock() - entered - self._work_seconds)
        self._known = True
        self._pass_on()

    def _pass_on(self) -> None:
        while self._queue:
            slot = self._queue.popleft()
            if not slot.done():
                slot.set_result(None)
                return
        self._running -= 1
        metrics.ADMITTED.dec()


class Gate:
    """The outermost ASGI app; settings come from EGA_SERVING when the worker builds it."""

    def __init__(self, app: App, settings: ServingConfig | None = None, token: str | None = None) -> None:
        self.app = app
        self.settings = settings or load_settings()
        self._token = (token if token is not None else os.environ.get(TOKEN_VARIABLE, "")).encode()
        self._admission = Admission(self.settings.admission_limit, self.settings.queue_ms / 1e3, self.settings.queue_calm_ms / 1e3)
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        send = _Tolerant(send)
        open_path = scope["path"] in _OPEN_PATHS
        if self._token and not open_path and not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + self._token):
            await self._refuse(send, receive, headers, 401, "unauthorized", f"send 'Authorization: Bearer <token>'; the server's is in {TOKEN_VARIABLE}")
        elif scope["method"] in _BODILESS:
            await self.app(scope, receive, _ErrorShape(send))
        else:
            await self._with_body(scope, headers, receive, send)

    async def _with_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        refusal = self._refuse_headers(headers)
        if refusal is not None:
            await self._refuse(send, receive, headers, *refusal)
            return
        length = int(headers[b"content-length"])
        self._buffered += length
        try:
            try:
                async with asyncio.timeout(self.settings.body_deadline_seconds):  # not wait_for: that is a task more for every request
                    body = await _read(receive, length)
            except TimeoutError:
                await self._refuse(send, None, headers, 408, "body_timeout", f"the body did not arrive within {self.settings.body_deadline_seconds:g} s")
                return
            if body is None:  # the client went away
                return
            if not body.strip():
                await self._refuse(send, None, headers, 400, "empty_body", "the body is empty; send a JSON object", close=False)
                return
            complete = time.perf_counter()
            entered = await self._admission.enter()
            if entered is None:
                await self._refuse(send, None, headers, 429, "overloaded", "too many requests at once; try again after Retry-After seconds", close=False)
                return
            metrics.QUEUE_SECONDS.observe(time.perf_counter() - complete)
            shaped = _ErrorShape(send)
            try:
                await self.app(scope, _Replay(body, receive), shaped)
            finally:
                self._admission.leave(entered)
                path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
                metrics.REQUEST_SECONDS.labels(path=path, status=str(shaped.status)).observe(time.perf_counter() - complete)
        finally:
            self._buffered -= length

    def _refuse_headers(self, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if content_type != b"application/json":
            return 415, "unsupported_media_type", "send Content-Type: application/json"
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            return 415, "unsupported_encoding", "send the body without Content-Encoding"
        length = headers.get(b"content-length")
        if length is None or b"transfer-encoding" in headers:
            return 411, "length_required", "send a Content-Length; chunked bodies are not accepted"
        if not length.isdigit() or len(length) > 18:
            return 400, "bad_length", "Content-Length must be a whole number of bytes"
        if int(length) > self.settings.body_limit_bytes:
            return 413, "body_too_large", f"the body may have at most {self.settings.body_limit_bytes} bytes"
        if self._buffered + int(length) > self.settings.body_budget_bytes:
            return 429, "overloaded", "too many large bodies at once; try again after Retry-After seconds"
        return None

    async def _refuse(
        self, send: Send, receive: Receive | None, headers: dict[bytes, bytes], status: int, code: str, message: str, close: bool = True
    ) -> None:
        metrics.REFUSED.labels(code=code).inc()
        if receive is not None and b"expect" not in headers:
            await self._drain(receive)
        body = error_body(code, message)
        extra = [(b"retry-after", b"1")] if status == 429 else []
        if status == 401:
            extra.append((b"www-authenticate", b"Bearer"))
        if close:
            extra.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": [*_json_headers(body), *extra]})
        await send({"type": "http.response.body", "body": body})

    async def _drain(self, receive: Receive) -> None:
        """Reads and drops a refused body, bounded in bytes and time: closing at once would reset clients that are still sending."""

        async def drop() -> None:
            left = _DRAIN_FACTOR * self.settings.body_limit_bytes
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))

        try:
            async with asyncio.timeout(self.settings.body_deadline_seconds):
                await drop()
        except TimeoutError:
            return


def _json_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]


async def _read(receive: Receive, length: int) -> bytes | None:
    """The whole body, or None if the client went away. The server enforces Content-Length, the check here is for other servers."""
    parts: list[bytes] = []
    read = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        read += len(part)
        if read <= length:
            parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


class _Replay:
    """Gives the app the body that was read already, then the connection itself (it waits there for a disconnect)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


class _Tolerant:
    """Drops what can no longer be sent because the client hung up: that is no error of ours and no reason for a traceback."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._gone = False

    async def __call__(self, message: Message) -> None:
        if self._gone:
            return
        if message["type"] == "http.response.start" and DRAINING.is_set():
            kept = [(name, value) for name, value in message["headers"] if name.lower() != b"connection"]
            message = {**message, "headers": [*kept, (b"connection", b"close")]}
        try:
            await self._send(message)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "closed" not in str(error):
                raise
            self._gone = True


class _ErrorShape:
    """Holds back an error answer until it is complete and sends it in our shape; other answers pass through untouched."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        """Of the answer; 0: none was sent."""
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if message["status"] >= 400:
                self._start = message
                return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        status, body = translate(self._start["status"], b"".join(self._parts))
        self.status = status
        metrics.REFUSED.labels(code=str(status)).inc()
        dropped = {b"content-type", b"content-length"}
        kept = [(name, value) for name, value in self._start["headers"] if name.lower() not in dropped]
        await self._send({"type": "http.response.start", "status": status, "headers": [*kept, *_json_headers(body)]})
        await self._send({"type": "http.response.body", "body": body})
