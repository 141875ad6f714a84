"""Every error of the library, in one tree.

    FlinkLlmError
    ├── ConfigError          a setting is wrong: names the key and what to do
    ├── LocalError           this machine lacks something, or a local service refuses
    ├── ModelFolderError     a model folder is refused before any of it is loaded
    ├── ExportError          an export is refused: parity, architecture, disk
    ├── StateError           state of another version, shard count or handler
    ├── ProtocolError        a peer on the model host's socket speaks something else
    ├── RecordError          the record's own fault: ends that record as a failure, never the job
    │   ├── DeadlineExceeded the record ran out of time
    │   └── Retriable        worth another try: a failure once that has not helped
    ├── Overloaded           refused for lack of room: tried again after `retry_after` seconds
    └── Outage               a part is down: no fault of any record; wait and try again
        └── CircuitOpen      it has failed too often, and is left alone for `retry_after` seconds

Two branches matter to the operator: `RecordError` (and any foreign exception that a handler
raises) becomes a failure record at once; `Retriable`, `Outage` and `Overloaded` are tried again.
"""

from typing import Any, Literal


class FlinkLlmError(Exception):
    """Root of the library's errors. `str(error)` is one line fit to be shown to a person."""


class ConfigError(FlinkLlmError):
    """A setting is missing, unknown or does not fit; the line names the key and the remedy."""


class LocalError(FlinkLlmError):
    """Something on this machine is missing or refuses: Java, a port, a folder, a broker."""


class ModelFolderError(FlinkLlmError):
    """A model folder was refused: nothing of it has reached ONNX Runtime."""


class ExportError(FlinkLlmError):
    """A model was not exported: unsupported, below the parity bar, or no room."""


class StateError(FlinkLlmError):
    """Flink state cannot be read by this version or configuration; both are named."""


class ProtocolError(FlinkLlmError):
    """A frame on the host's socket is not one of this protocol."""


class RecordError(FlinkLlmError):
    """This record cannot be answered. `code` is stable and machine-readable, see `CODES`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.message)


class DeadlineExceeded(RecordError):
    """The record's deadline (seconds from its arrival at the operator) has passed."""

    def __init__(self, message: str = "the deadline has passed") -> None:
        super().__init__("deadline", message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,)


class Retriable(RecordError):
    """This record may be answered at another try, `retry_after` seconds from now at the earliest.

    For a handler to raise. The call runs again after a wait that doubles from try to try, `operator.retries`
    times at most and inside the record's deadline; then the record is a failure with this `code`.
    """

    def __init__(self, code: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(code, message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.message, self.retry_after)


class Overloaded(FlinkLlmError):
    """The service has no room now. `retry_after` is in seconds.

    `reason` is "full", or "deadline" when whoever waited would be served too late.
    """

    def __init__(self, message: str, retry_after: float = 0.1, reason: Literal["full", "deadline"] = "full") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class Outage(FlinkLlmError):
    """A part the job stands on is gone: model host, feature store, memory."""


class CircuitOpen(Outage):
    """A part has failed several times in a row: this call has not reached it. Come again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


CODES: dict[str, str] = {
    "null_value": "the record has no value",
    "malformed": "the value is not valid JSON, or not valid UTF-8",
    "invalid": "a field is missing, of the wrong type or out of its range",
    "empty_text": "there is no text to work on",
    "too_large": "the text is longer than the configured limit",
    "bad_key": "the key of the record cannot be read",
    "bad_option": "a generation option is out of its range",
    "unknown_model": "no model of that name is served",
    "unknown_adapter": "the model has no adapter of that name",
    "context_overflow": "the prompt does not fit into the model's context",
    "bad_reply_to": "reply_to names a topic outside the configured list",
    "result_too_large": "the result is larger than its topic takes",
    "bad_result": "the handler returned something else than it declares",
    "bad_state": "the handler left a value in its state that cannot be stored",
    "handler_error": "the handler raised an exception",
    "model_error": "the model produced something unusable",
    "deadline": "the deadline has passed",
    "overloaded": "refused for lack of room until the deadline",
    "shed": "refused at arrival, as its deadline could not be met (only with shed: on)",
    "outage": "a part was down until the deadline (only with on_outage: deadline)",
    "conflicting_request": "the request id was used before with another payload",
    "missing_features": "a row of features cannot be decoded or computed, or a handler lacks one that it requires",
}
"""Failure codes and what each means. Codes are never renamed; new ones may be added."""


def told(error: BaseException) -> str:
    """Class and message of whatever a handler has raised, even where its `__str__` raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
