"""The service's log: one JSON object a line, on standard error, from the service, BentoML and uvicorn alike."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_NAMES = ("ega", "bentoml", "uvicorn")


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message; `exception` with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(form: str) -> None:
    """Send the logs of the service to standard error as 'json' or 'text'."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in _NAMES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("ega").setLevel(logging.INFO)
