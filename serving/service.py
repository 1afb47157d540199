"""The BentoML service: `bentoml serve serving.service:Ranker`, with EGA_SERVING naming the settings (`ega serve` does both)."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
from starlette.responses import Response

from serving.errors import QuietValidation, Refusal, error_body
from serving.gate import Gate
from serving.messages import EventsRequest, EventsResponse, RankRequest, RankResponse
from serving.settings import STARTUP_ERROR_VARIABLE, load_settings

if TYPE_CHECKING:
    from serving.ranking import Ranking

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
        self._ranking: Ranking | None = None

    @bentoml.on_startup
    def start(self) -> None:
        """Load and warm up beside the event loop, so that /livez answers meanwhile and /readyz says 503."""
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def _load(self) -> None:
        from serving.assembly import assemble  # torch and Feast: seconds, and only the worker needs them

        try:
            ranking = assemble(load_settings())
            ranking.warm_up()
        except Exception as error:
            logger.exception("the service cannot start and stays not ready")
            if complaint := os.environ.get(STARTUP_ERROR_VARIABLE):
                Path(complaint).write_text(str(error))
            return
        self._ranking = ranking

    def __is_ready__(self) -> bool:
        return self._ranking is not None

    @bentoml.api(route="/v1/rank")
    def rank(self, request: RankRequest, /) -> RankResponse:
        """A priced page of ads; it is in the event log before the answer is sent."""
        return self._call(lambda ranking: ranking.rank(request))

    @bentoml.api(route="/v1/events")
    def events(self, request: EventsRequest, /) -> EventsResponse:
        """Clicks and purchases on ads shown; each is counted once, however often it is sent."""
        return self._call(lambda ranking: ranking.events(request).model_dump(mode="json"))

    def _call(self, work: Any) -> Any:
        if self._ranking is None:
            return _json(503, error_body("not_ready", "the service is warming up; try again"))
        try:
            return _json(200, json.dumps(work(self._ranking), allow_nan=False).encode())
        except Refusal as refusal:
            return _json(refusal.status, error_body(refusal.code, refusal.message, refusal.field))


Ranker.add_asgi_middleware(Gate)
