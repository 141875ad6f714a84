"""Ids that nobody else has."""

import itertools
import os

_numbers = itertools.count()
_of_process: list[str] = []


def new_id() -> str:
    """32 hexadecimal digits: the process's, by chance, and its count.

    A random id for each would ask the system for bytes, which may take longer than all else of a short call.
    """
    if not _of_process:
        _of_process.append(os.urandom(8).hex())
    return f"{_of_process[0]}{next(_numbers):016x}"


os.register_at_fork(after_in_child=_of_process.clear)
