"""ASGI gate in front of the service: refuses what is not worth parsing, before it costs anything.

Order: 401 without the token, 415 unless plain JSON, 411 without a length, 413 above the cap, 429 when too many bodies are
in memory, 408 when the body is late, 400 when it is empty, 429 + Retry-After without a free admission slot; then the app.
The body is complete before a slot is taken, so slow senders hold none. Error answers of the app leave in one JSON shape.
"""

from __future__ import annotations

import asyncio
import hmac
import os
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
_BODILESS = {"GET", "HEAD", "OPTIONS"}
_DRAIN_FACTOR = 16
"""A refused body is read and dropped up to this many times the cap, so that an ordinary client gets to read the refusal."""


class Gate:
    """Middleware for `Ranker.add_asgi_middleware(Gate)`; settings come from EGA_SERVING when the worker builds its app."""

    def __init__(self, app: App, settings: ServingConfig | None = None, token: str | None = None) -> None:
        self.app = app
        self.settings = settings or load_settings()
        self._token = (token if token is not None else os.environ.get(TOKEN_VARIABLE, "")).encode()
        self._admitted = 0
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
                body = await asyncio.wait_for(_read(receive, length), self.settings.body_deadline_seconds)
            except TimeoutError:
                await self._refuse(send, None, headers, 408, "body_timeout", f"the body did not arrive within {self.settings.body_deadline_seconds:g} s")
                return
            if body is None:  # the client went away
                return
            if not body.strip():
                await self._refuse(send, None, headers, 400, "empty_body", "the body is empty; send a JSON object", close=False)
                return
            if self._admitted >= self.settings.admission_limit:
                await self._refuse(send, None, headers, 429, "overloaded", "too many requests at once; try again after Retry-After seconds", close=False)
                return
            self._admitted += 1
            metrics.ADMITTED.set(self._admitted)
            try:
                await self.app(scope, _Replay(body, receive), _ErrorShape(send))
            finally:
                self._admitted -= 1
                metrics.ADMITTED.set(self._admitted)
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
            await asyncio.wait_for(drop(), self.settings.body_deadline_seconds)
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
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
            return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        status, body = translate(self._start["status"], b"".join(self._parts))
        metrics.REFUSED.labels(code=str(status)).inc()
        dropped = {b"content-type", b"content-length"}
        kept = [(name, value) for name, value in self._start["headers"] if name.lower() not in dropped]
        await self._send({"type": "http.response.start", "status": status, "headers": [*kept, *_json_headers(body)]})
        await self._send({"type": "http.response.body", "body": body})
