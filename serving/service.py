"""The BentoML service: `bentoml serve serving.service:Ranker`, with EGA_SERVING naming the settings (`ega serve` does both)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import bentoml
from pydantic import BaseModel
from starlette.responses import Response

from serving import metrics
from serving.backend import CALLS, Backend, BackendError, BackendLost, end_with_parent
from serving.errors import QuietValidation, error_body
from serving.gate import CHANGING, DRAINING, Gate
from serving.logs import configure
from serving.messages import EventsRequest, EventsResponse, RankRequest, RankResponse
from serving.settings import STARTUP_ERROR_VARIABLE, load_settings

_RESTART_SECONDS = 2.0

logger = logging.getLogger("ega.serving")
logging.getLogger("bentoml._internal.server.http_app").addFilter(QuietValidation())


def _json(status: int, body: bytes) -> Any:
    return Response(body, status, media_type="application/json", headers={"Retry-After": "1"} if status == 503 else None)


@bentoml.service(
    name="ranker",
    workers=1,
    threads=CALLS,
    traffic={"timeout": 30},
    metrics={"enabled": True, "namespace": "ega"},
    logging={"access": {"enabled": False}},
)
class Ranker:
    """Ads for a page view, ranked by a set-aware model over the whole city and priced by an auction."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._ready = self._ending = False

    @bentoml.on_startup
    def start(self) -> None:
        """Start the ranking process beside the event loop, so that /livez answers meanwhile and /readyz says 503."""
        DRAINING.clear()
        metrics.forget_dead_workers()
        metrics.READY.set(0)
        config = load_settings()
        configure(config.log_format)
        if threading.current_thread() is threading.main_thread():  # not under a test client
            _drain_on_sigterm(config.drain_seconds)
            end_with_parent(signal.SIGTERM)  # when the supervisor dies: a worker that outlives it would hold the ports that its successor needs
        threading.Thread(target=self._keep_backend, name="backend", daemon=True).start()

    def _keep_backend(self) -> None:
        """One that dies is replaced. Where the first says that something it needs is missing, no other is tried: who watches readiness sees it."""
        served = False
        while not self._ending:
            try:
                self._backend = Backend()
                self._backend.wait_ready()
                self._ready = served = True
                metrics.READY.set(1)
                logger.info("ready")
                code = self._backend.watch(CHANGING)
                if not self._ending:
                    logger.error("the ranking process ended with exit code %d; another one is started", code)
            except (BackendError, BackendLost, OSError) as error:  # OSError: no descriptors or processes left
                if isinstance(error, BackendError) and not served:
                    if complaint := os.environ.get(STARTUP_ERROR_VARIABLE):
                        Path(complaint).write_text(str(error))
                    return
                logger.error("the ranking process could not start and is tried again: %s", error)
                time.sleep(_RESTART_SECONDS)
            finally:
                self._ready = False
                metrics.READY.set(0)
            metrics.forget_dead_workers()

    @bentoml.on_shutdown
    def end(self) -> None:
        """After the last request: what is in memory only ends in order."""
        self._ending = True
        if self._backend is not None:
            self._backend.close()

    async def __is_ready__(self) -> bool:
        return self._ready and not DRAINING.is_set()

    @bentoml.api(route="/v1/rank")
    def rank(self, request: RankRequest, /) -> RankResponse:
        """A priced page of ads; it is in the event log before the answer is sent."""
        return self._call("rank", request)

    @bentoml.api(route="/v1/events")
    def events(self, request: EventsRequest, /) -> EventsResponse:
        """What users did with ads and organic results shown; each event is counted once, however often it is sent."""
        return self._call("events", request)

    def _call(self, path: str, request: BaseModel) -> Any:
        if not self._ready or self._backend is None:
            return _json(503, error_body("not_ready", "the service is warming up; try again"))
        return _json(*self._backend.call(path, request.model_dump_json(exclude_unset=True).encode()))


def _drain_on_sigterm(seconds: float) -> None:
    """On SIGTERM first say not ready and close kept-alive connections as they are answered, then stop as the server does; a second one stops at once."""
    loop, stop = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    if not callable(stop):
        return

    def drain(number: int, frame: Any) -> None:
        if DRAINING.is_set():
            stop(number, frame)
            return
        DRAINING.set()
        metrics.READY.set(0)
        loop.call_soon_threadsafe(loop.call_later, seconds, stop, number, None)

    signal.signal(signal.SIGTERM, drain)


class _Gated(type(Ranker)):  # type: ignore[misc]
    """A BentoML service whose whole app stands behind the gate.

    BentoML's own hook for middleware puts it behind tracing, traffic metrics and timeouts: a refusal then costs ten times as much, and in
    overload refusals are nearly all there is.
    """

    __slots__ = ()

    def to_asgi(self, is_main: bool = True) -> Any:
        return Gate(super().to_asgi(is_main))


Ranker.__class__ = _Gated
