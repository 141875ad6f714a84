"""The columns that a vectorised function is given, as rows of plain Python values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from flink_llm.errors import ConfigError, RecordError
from flink_llm.udfs.answers import TEXTS, read_options
from flink_llm.udfs.batches import Row

_EXACT = 2**53
"""Whole numbers below this are exact as the floats that pandas makes of a column which holds NULLs."""


def rows_of(
    name: str, arguments: Sequence[Any], texts: int, options: tuple[str, ...] | None
) -> list[Row | RecordError | None]:
    """Each row of a call: what is to be asked, what is wrong with it, or None for a NULL in what must be there.

    The first `texts` arguments must be text, and one more may hold options, the names of which are `options`;
    where that is None, all arguments behind the first are keys. Raises ConfigError for a call that no row could
    ever make.
    """
    given, most = len(arguments), texts + 1 if options is not None else None
    if given < max(texts, 2) or (most is not None and given > most):
        wanted = f"{texts} or {most}" if most is not None else "2 or more"
        raise ConfigError(f"{name} takes {wanted} arguments, the query gives it {given}")
    lengths = [len(argument) for argument in arguments if isinstance(argument, (pd.Series, pd.DataFrame))]
    if not lengths:
        raise ConfigError(f"{name} is given constants only: Flink calls it for columns, make one of them a column")
    columns = [_cells(argument, lengths[0]) for argument in arguments]
    return [_row(name, row, texts, options) for row in zip(*columns, strict=True)]


def _row(name: str, cells: tuple[Any, ...], texts: int, options: tuple[str, ...] | None) -> Row | RecordError | None:
    needed, chosen = (cells, None) if options is None else (cells[:texts], (*cells, None)[texts])
    if any(cell is None for cell in needed):
        return None
    for number, cell in enumerate(cells[:texts]):
        if not isinstance(cell, str):
            return RecordError("invalid", f"argument {number + 1} of {name} is no text: CAST(... AS STRING)")
    if options is None:
        if any(isinstance(cell, float) for cell in cells):
            return RecordError("invalid", "a number beside NULLs is 2**53 or more, or is none: CAST(... AS STRING)")
        if not all(isinstance(cell, (str, int, bytes)) for cell in cells):
            return RecordError("invalid", f"a key of {name} is neither text nor a whole number: CAST(... AS STRING)")
        return Row(cells)
    try:
        text = _options_text(chosen)
        read = read_options(text, options)
    except RecordError as error:
        return error
    return Row((*needed, text), read.get("deadline"), read.get("priority"))


def _options_text(given: Any) -> str | None:
    """Options as JSON: they may also be a MAP, whose values are JSON or else text, those of `TEXTS` always text."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        raise RecordError("bad_option", "options is neither a JSON object nor a MAP of text")
    read = {name: text if name in TEXTS else _value(text) for name, text in sorted(given.items())}
    return msgspec.json.encode(read).decode()


def _value(text: Any) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, TypeError, UnicodeError, RecursionError):
        return text


def _cells(argument: Any, count: int) -> list[Any]:
    if isinstance(argument, pd.DataFrame):
        raise ConfigError("a ROW is no argument of these functions: give them its fields")
    if not isinstance(argument, pd.Series):
        return [argument] * count
    return [_cell(value) for value in argument.tolist()]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if value is None or value is pd.NaT:
        return None
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    if isinstance(value, list):  # a MAP comes as pairs
        return dict(value)
    return value
