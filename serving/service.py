"""The BentoML service: `bentoml serve serving.service:Ranker`, with EGA_SERVING naming the settings (`ega serve` does both)."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
from starlette.responses import Response

from serving import metrics
from serving.errors import QuietValidation, Refusal, error_body
from serving.gate import DRAINING, Gate
from serving.logs import configure
from serving.messages import EventsRequest, EventsResponse, RankRequest, RankResponse
from serving.settings import STARTUP_ERROR_VARIABLE, ServingConfig, load_settings

if TYPE_CHECKING:
    from serving.admin import AdminServer
    from serving.assembly import Assembled

_PR_SET_PDEATHSIG = 1

logger = logging.getLogger("ega.serving")
logging.getLogger("bentoml._internal.server.http_app").addFilter(QuietValidation())


def _json(status: int, body: bytes) -> Any:
    return Response(body, status, media_type="application/json", headers={"Retry-After": "1"} if status == 503 else None)


@bentoml.service(
    name="ranker",
    workers=1,
    threads=2,
    traffic={"timeout": 30},
    metrics={"enabled": True, "namespace": "ega"},
    logging={"access": {"enabled": False}},
)
class Ranker:
    """Ads for a page view, ranked by a set-aware model over the whole city and priced by an auction."""

    def __init__(self) -> None:
        self._assembled: Assembled | None = None
        self._admin: AdminServer | None = None

    @bentoml.on_startup
    def start(self) -> None:
        """Load and warm up beside the event loop, so that /livez answers meanwhile and /readyz says 503."""
        DRAINING.clear()
        metrics.forget_dead_workers()
        metrics.READY.set(0)
        config = load_settings()
        configure(config.log_format)
        if threading.current_thread() is threading.main_thread():  # not under a test client
            _drain_on_sigterm(config.drain_seconds)
            _end_with_parent()
        threading.Thread(target=self._load, args=(config,), name="load", daemon=True).start()

    def _load(self, config: ServingConfig) -> None:
        from serving.assembly import assemble  # torch and Feast: seconds, and only the worker needs them

        try:
            assembled = assemble(config)
            assembled.ranking.warm_up()
            assembled.feed.start()
            if config.admin_port and assembled.models is not None:
                from serving.admin import AdminServer

                self._admin = AdminServer(config, assembled.models)
                self._admin.start()
        except Exception as error:
            logger.exception("the service cannot start and stays not ready")
            if complaint := os.environ.get(STARTUP_ERROR_VARIABLE):
                Path(complaint).write_text(str(error))
            return
        self._assembled = assembled
        metrics.READY.set(1)
        logger.info("ready")

    @bentoml.on_shutdown
    def end(self) -> None:
        """After the last request: what is in memory only ends in order."""
        if self._admin is not None:
            self._admin.stop()
        if self._assembled is not None:
            self._assembled.close()

    async def __is_ready__(self) -> bool:
        return self._assembled is not None and not DRAINING.is_set()

    @bentoml.api(route="/v1/rank")
    def rank(self, request: RankRequest, /) -> RankResponse:
        """A priced page of ads; it is in the event log before the answer is sent."""
        return self._call(lambda ranking: ranking.rank(request))

    @bentoml.api(route="/v1/events")
    def events(self, request: EventsRequest, /) -> EventsResponse:
        """What users did with ads and organic results shown; each event is counted once, however often it is sent."""
        return self._call(lambda ranking: ranking.events(request).model_dump(mode="json", exclude_none=True))

    def _call(self, work: Any) -> Any:
        if self._assembled is None:
            return _json(503, error_body("not_ready", "the service is warming up; try again"))
        try:
            return _json(200, json.dumps(work(self._assembled.ranking), allow_nan=False).encode())
        except Refusal as refusal:
            return _json(refusal.status, error_body(refusal.code, refusal.message, refusal.field))


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


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the supervisor dies: a worker that outlives it would hold the ports that its successor needs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Gated(type(Ranker)):  # type: ignore[misc]
    """A BentoML service whose whole app stands behind the gate.

    BentoML's own hook for middleware puts it behind tracing, traffic metrics and timeouts: a refusal then costs ten times as much, and in
    overload refusals are nearly all there is.
    """

    __slots__ = ()

    def to_asgi(self, is_main: bool = True) -> Any:
        return Gate(super().to_asgi(is_main))


Ranker.__class__ = _Gated
