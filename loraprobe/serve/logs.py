"""Log lines of JSON: one a request, and one for whatever else there is to say.

Nothing a client sent is in them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

LOGGER = logging.getLogger("loraprobe.serve")


def log(event: str, fields: Mapping[str, Any]) -> None:
    """Something that happened, as a record of the logger.

    Without looking for who says so, which takes longer than the rest.
    """
    if LOGGER.isEnabledFor(logging.INFO):
        record = logging.LogRecord(LOGGER.name, logging.INFO, "", 0, event, (), None)
        record.fields = fields
        LOGGER.handle(record)


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level and event, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without a line break in it."""
        at = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
        line: dict[str, Any] = {
            "time": at,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= record.__dict__.get("fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


@lru_cache(2)
def _second(since: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since))


def log_to_stderr() -> None:
    """Send the service's and uvicorn's records to stderr as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for logger, level in (
        (LOGGER, logging.INFO),
        (logging.getLogger("uvicorn.error"), logging.WARNING),
    ):
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
