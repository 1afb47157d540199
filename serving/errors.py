"""Refusals: one JSON shape for every status of 400 or more, short, without paths, tracebacks or echoed input."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

_LONGEST_MESSAGE = 300


class Refusal(Exception):
    """The caller's request cannot be served as it is.

    Args: status: HTTP status, 4xx; code: stable name; message: what was wrong and what would be right; field: path in the body.
    """

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field


@lru_cache(maxsize=64)
def error_body(code: str, message: str, field: str | None = None) -> bytes:
    """`{"error": {"code", "message", "field"}}` as UTF-8 JSON."""
    return json.dumps({"error": {"code": code, "message": message[:_LONGEST_MESSAGE], "field": field}}).encode()


_UNION_BRANCHES = {"datetime", "float", "constrained-float"}
"""Path parts that pydantic adds for the branches of a union: no fields of ours."""

_BY_STATUS = {
    400: ("bad_request", "the request is malformed"),
    404: ("not_found", "no such path; the API is POST /v1/rank and POST /v1/events"),
    405: ("method_not_allowed", "wrong method for this path; the API takes POST"),
    408: ("timeout", "the body did not arrive in time"),
    413: ("body_too_large", "the body is too large"),
    415: ("unsupported_media_type", "send application/json"),
    429: ("overloaded", "too many requests; try again after Retry-After"),
    500: ("internal_error", "an internal error; it was logged"),
    503: ("not_ready", "the service is not ready"),
    504: ("timeout", "the request took too long"),
}


def translate(status: int, body: bytes) -> tuple[int, bytes]:
    """Our status and body for an error answer made by the framework (or by us: then unchanged).

    A validation error becomes 400 if the body is not JSON at all and 422 if a field is wrong; it names the first wrong field.
    """
    try:
        answer: Any = json.loads(body)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        error = answer.get("error")
        if isinstance(error, dict) and {"code", "message", "field"} <= error.keys():
            return status, body
        detail = answer.get("detail")
        if status == 400 and isinstance(detail, list) and detail and isinstance(detail[0], dict):
            return _validation(detail[0])
    code, message = _BY_STATUS.get(status, ("error", "the request was refused"))
    return status, error_body(code, message)


def _validation(first: dict[str, Any]) -> tuple[int, bytes]:
    message = str(first.get("msg", "invalid")).removeprefix("Value error, ")
    if first.get("type") == "json_invalid":
        return 400, error_body("invalid_json", f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    where = [str(part)[:64] for part in first.get("loc", ())]
    while where and where[-1] in _UNION_BRANCHES:
        where.pop()
    field = ".".join(where) or None
    return 422, error_body("invalid_field", message, field)


class QuietValidation(logging.Filter):
    """Keeps refused requests out of the error log: a caller's mistake is no incident, and hostile traffic must not fill the disk."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not isinstance(error, ValidationError)
