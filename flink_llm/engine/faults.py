"""What went wrong with a piece of work or a model, as whoever asked for it is told."""

import re

from flink_llm.codec import printable
from flink_llm.engine.protocol import Fault
from flink_llm.errors import ConfigError, FlinkLlmError, ModelFolderError, Outage, Overloaded, RecordError

LONGEST = 500
MODEL_ERROR = "model_error"
"""The code of a record that a model failed on, for no reason that is known to be the record's."""
_NO_ROOM = re.compile("allocat|bad_alloc|out of memory", re.IGNORECASE)


def fault_of(error: BaseException, call: int = 0) -> Fault:
    """The fault of an error. Foreign ones are the record's, unless it was memory that was lacking."""
    if isinstance(error, Overloaded):
        text = printable(error, LONGEST)
        return Fault(call=call, kind="overloaded", code="overloaded", message=text, retry_after=error.retry_after)
    if isinstance(error, RecordError):
        return Fault(call=call, kind="record", code=error.code, message=printable(error.message, LONGEST))
    if isinstance(error, (ModelFolderError, ConfigError)):
        return Fault(call=call, kind="model_folder", code="model_folder", message=printable(error, LONGEST))
    text = printable(error if isinstance(error, FlinkLlmError) else f"{type(error).__name__}: {error}", LONGEST)
    if isinstance(error, FlinkLlmError) or lacks_memory(error):
        return Fault(call=call, kind="outage", code="outage", message=text)
    return Fault(call=call, kind="record", code=MODEL_ERROR, message=text)


def fault_error(fault: Fault) -> Exception:
    """The error of a fault that an engine reports."""
    if fault.kind == "record":
        return RecordError(fault.code, fault.message)
    if fault.kind == "overloaded":
        return Overloaded(fault.message, fault.retry_after)
    return Outage(fault.message)


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python or in ONNX Runtime, whose errors differ by their texts only.

    A run over bound buffers raises Python's own RuntimeError.
    """
    text = str(error)
    foreign = type(error).__module__.startswith("onnxruntime") or text.startswith("Error in execution")
    return isinstance(error, MemoryError) or (foreign and _NO_ROOM.search(text) is not None)


def closed(call: int) -> Fault:
    """The fault of work that an engine was closed under."""
    return fault_of(Outage("the engine is closed"), call)
