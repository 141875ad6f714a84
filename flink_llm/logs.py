"""Logs of one JSON object a line, each with the request that it is about."""

import logging
import math
import re
from typing import Any

from pythonjsonlogger.json import JsonEncoder, JsonFormatter

from flink_llm.engine.generation import current_call

_JSON = JsonEncoder(ensure_ascii=False, allow_nan=False)
_HALF = re.compile("[\ud800-\udfff]")
"""Half a character, which no stream takes."""


class JsonLines(JsonFormatter):
    """One JSON object a line: time, level, logger, message, and the request that it is about.

    That is the call whose task, or a task started by it, is logging; `extra` may name another. What JSON has not,
    numbers that are not finite, keys that are no text and half characters among it, is text.
    """

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger", "threadName": "thread"}
        form = "%(levelname)s %(name)s %(threadName)s %(message)s"
        super().__init__(form, rename_fields=names, timestamp="time", json_serializer=_line)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """See JsonFormatter."""
        super().add_fields(log_data, record, message_dict)
        call = current_call.get(None)
        if call is not None:
            log_data.setdefault("request_id", call.request_id)
            log_data.setdefault("job", call.job)
            log_data.setdefault("operator", call.operator)


def _line(fields: dict[str, Any], **_: Any) -> str:
    try:
        line = _JSON.encode(fields)
    except Exception:  # a line says what it can: nobody would know of one that is lost
        line = _JSON.encode({str(name): _writable(value) for name, value in fields.items()})
    return _HALF.sub(lambda half: f"\\\\u{ord(half[0]):x}", line)


def _writable(value: Any) -> Any:
    try:
        plain = _plain(value)
        _JSON.encode(plain)
    except Exception:  # it holds itself, or has no end
        return f"a {type(value).__name__} that cannot be written"
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shape_logs(logs: str) -> None:
    """Has every handler of the root logger write so, in this process and from now on."""
    if logs == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
