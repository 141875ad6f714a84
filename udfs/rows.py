"""Rows on their way between Java and a Python operator, made by lighter means than PyFlink's.

Each `Row` that PyFlink makes costs several calls in Python, and a record of the async operator passes eight:
30 µs of them, more than all that its handler's runner does. Rows that are read are made of a class that sets
its attributes directly; rows that are written are what PyFlink's coders make of rows themselves.

No API, as in `flink_llm.udfs.bundles`: `coder_impl_fast.Row`, `RowKind` and `InternalRow`, `input_handler.Row`,
`operations.Row`.
"""

from functools import lru_cache
from typing import Any

from pyflink.common import Row, RowKind
from pyflink.fn_execution import coder_impl_fast
from pyflink.fn_execution.datastream.process import input_handler, operations

KEYS = 4096
"""Rows of keys that are kept: an operator of ours has one for each of its shards."""
_INSERT = RowKind.INSERT.value


class ReadRow(Row):  # type: ignore[misc]
    """A row as coders read it; equal to the row that it stands for."""

    _from_dict = False
    __init__ = object.__init__
    __setattr__ = object.__setattr__

    def __eq__(self, other: object) -> bool:
        mine, theirs = _plain(self), _plain(other)
        return bool(mine == theirs)

    __hash__ = Row.__hash__


def _plain(value: Any) -> Any:
    if not isinstance(value, ReadRow):
        return value
    row = Row()
    row.__dict__.update(value.__dict__)
    return row


def written(*values: Any) -> Any:
    """A row that is only to be written, by a coder."""
    return coder_impl_fast.InternalRow(list(values), _INSERT)


_key = lru_cache(KEYS, typed=True)(Row)


def _selected(*values: Any) -> Any:
    """The row of an element's key, which nobody changes, or of an element and its time, which is only written."""
    if len(values) > 1:
        return written(*values)
    try:
        return _key(*values)
    except TypeError:  # a key that cannot be hashed
        return Row(*values)


def lean_rows() -> None:
    """From now on, in this process."""
    coders: Any = coder_impl_fast
    coders.Row = ReadRow
    coders.RowKind = {kind.value: kind for kind in RowKind}.__getitem__
    handler: Any = input_handler
    handler.Row = written
    selector: Any = operations
    selector.Row = _selected
