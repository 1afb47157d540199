"""The OpenAPI document of the service, made from the request models. `python -m serving.openapi` rewrites docs/openapi.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.messages import ErrorResponse, EventsRequest, EventsResponse, RankRequest, RankResponse

FILE = Path(__file__).resolve().parents[1] / "docs" / "openapi.json"

_ERRORS = {
    400: "The body is not JSON, or empty.",
    401: "The bearer token is missing or wrong (only where the service has one).",
    408: "The body did not arrive in time.",
    409: "The request_id was answered for another body.",
    411: "Content-Length is missing.",
    413: "The body is too large.",
    415: "Content-Type is not application/json.",
    422: "A field is wrong: the error names it.",
    429: "Too many requests at once; Retry-After says when to try again.",
    503: "Not ready, or the event log cannot be written.",
}


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _post(name: str, summary: str, request: type[BaseModel], response: type[BaseModel], errors: set[int]) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": (response.__doc__ or "").strip(), "content": _content(response)}}
    for status, text in _ERRORS.items():
        if status in errors:
            answers[str(status)] = {"description": text, "content": _content(ErrorResponse)}
    body = {"required": True, "content": _content(request)}
    return {"post": {"operationId": name, "summary": summary, "security": [{}, {"token": []}], "requestBody": body, "responses": answers}}


def _get(name: str, summary: str, answers: dict[str, str]) -> dict[str, Any]:
    return {"get": {"operationId": name, "summary": summary, "responses": {status: {"description": text} for status, text in answers.items()}}}


def specification() -> dict[str, Any]:
    """The OpenAPI 3.1 document as a JSON-able dict."""
    models = [(model, "validation") for model in (RankRequest, EventsRequest)]
    models += [(model, "serialization") for model in (RankResponse, EventsResponse, ErrorResponse)]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "EGA ranking service", "version": "1", "description": "Priced pages of ads, and what users did with them."},
        "paths": {
            "/v1/rank": _post("rank", "A priced page of ads.", RankRequest, RankResponse, set(_ERRORS)),
            "/v1/events": _post("events", "Clicks and purchases on ads shown, and clicks on creatives and organic results.", EventsRequest, EventsResponse, set(_ERRORS) - {409}),
            "/readyz": _get("readyz", "Whether the service is warm.", {"200": "Ready.", "503": "Warming up, or it could not start."}),
            "/livez": _get("livez", "Whether the process lives.", {"200": "Alive."}),
            "/metrics": _get("metrics", "Prometheus metrics.", {"200": "Text exposition format."}),
        },
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def rendered() -> str:
    """The document as it is kept in docs/openapi.json."""
    return json.dumps(specification(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(rendered())
