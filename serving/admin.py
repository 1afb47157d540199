"""Model operations on a port of their own: GET /v1/models, POST /v1/models/activate and /v1/models/rollback.

Loopback by default, behind the same gate as the ranking port, with a token of its own. `ega models` is its client and finds the
address in `<home>/serving/admin.json`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model.bundle import write_atomic
from serving.errors import error_body
from serving.gate import Gate
from serving.live import Busy, LiveModels, Refused
from serving.settings import ADMIN_TOKEN_VARIABLE, ServingConfig, SettingsError
from serving.store import LIVE

logger = logging.getLogger("ega.serving")

_BODY_LIMIT = 4096


class Place(BaseModel):
    """Where a model serves."""

    model_config = ConfigDict(strict=True, extra="forbid")
    place: str = Field(LIVE, description="'live', 'shadow' or 'arm:<name>'.", max_length=80)


class Activation(Place):
    """Which model takes a place."""

    tag: str = Field(description="Exact tag, e.g. 'ega-v1:0123456789ab'; empty takes the place's own model away.", max_length=120)


def address_file(home: Path) -> Path:
    """Where a running service says how its admin port is reached."""
    return home / "serving" / "admin.json"


def application(config: ServingConfig, models: LiveModels, token: str) -> Any:
    """The ASGI app of the admin port."""

    async def listing(_: Request) -> Response:
        return JSONResponse({"models": await run_in_threadpool(models.models)})

    async def activate(request: Request) -> Response:
        try:
            body = Activation.model_validate_json(await request.body())
        except ValidationError as error:
            return _refusal(422, "invalid_field", error.errors(include_url=False)[0]["msg"])
        return await _changed(lambda: models.activate(body.tag, body.place))

    async def rollback(request: Request) -> Response:
        try:
            body = Place.model_validate_json(await request.body())
        except ValidationError as error:
            return _refusal(422, "invalid_field", error.errors(include_url=False)[0]["msg"])
        return await _changed(lambda: models.rollback(body.place))

    async def _changed(work: Any) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(work))
        except Refused as error:
            return _refusal(409, "refused", str(error))
        except Busy as error:
            return _refusal(409, "busy", str(error))

    routes = [
        Route("/v1/models", listing, methods=["GET"]),
        Route("/v1/models/activate", activate, methods=["POST"]),
        Route("/v1/models/rollback", rollback, methods=["POST"]),
    ]
    limits = replace(config, body_limit_bytes=_BODY_LIMIT, admission_limit=4)
    return Gate(Starlette(routes=routes), limits, token)


def _refusal(status: int, code: str, message: str) -> Response:
    return Response(error_body(code, message), status, media_type="application/json")


class AdminServer:
    """The admin port, on a thread of the ranking process."""

    def __init__(self, config: ServingConfig, models: LiveModels) -> None:
        """Listens at once. Raises SettingsError for an open address without a token, OSError where the port is taken."""
        token = os.environ.get(ADMIN_TOKEN_VARIABLE, "")
        if not token and not ip_address(config.admin_host).is_loopback:
            raise SettingsError(f"admin_host {config.admin_host} is not a loopback address: set {ADMIN_TOKEN_VARIABLE}, or nobody is kept from changing models")
        self._socket = socket.create_server((config.admin_host, config.admin_port))
        self._server = uvicorn.Server(uvicorn.Config(application(config, models, token), log_config=None, server_header=False))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="admin", daemon=True)
        self._file = address_file(config.home)
        self._url = f"http://{config.admin_host}:{config.admin_port}"

    def start(self) -> None:
        self._thread.start()
        write_atomic(self._file, json.dumps({"url": self._url, "pid": os.getpid()}).encode())
        logger.info("admin port: %s", self._url)

    def stop(self) -> None:
        self._file.unlink(missing_ok=True)
        self._server.should_exit = True
        self._thread.join(5.0)
