"""Logs of one JSON object a line, each with the request that it is about."""

import logging
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from flink_llm.engine.generation import current_call


class JsonLines(JsonFormatter):
    """One JSON object a line: time, level, logger, message, and the request that it is about.

    That is the call whose task, or a task started by it, is logging; `extra` may name another.
    """

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger", "threadName": "thread"}
        form = "%(levelname)s %(name)s %(threadName)s %(message)s"
        super().__init__(form, rename_fields=names, timestamp="time", json_ensure_ascii=False)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """See JsonFormatter."""
        super().add_fields(log_data, record, message_dict)
        call = current_call.get(None)
        if call is not None:
            log_data.setdefault("request_id", call.request_id)
            log_data.setdefault("job", call.job)
            log_data.setdefault("operator", call.operator)


def shape_logs(logs: str) -> None:
    """Has every handler of the root logger write so, in this process and from now on."""
    if logs == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
