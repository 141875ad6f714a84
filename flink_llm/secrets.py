"""Which settings are secrets, and how they are kept out of whatever is printed."""

import re
from collections.abc import Iterator
from typing import Any, TypeVar

MASK = "********"
_NAME = re.compile(
    r"passw|(^|[._-])(pwd|pass|token)$|secret|jaas|credential|authorization|connection_string|user[._-]info|sas[._-].*token"
    r"|(api|access|private|account|storage|shared|keystore|encryption)[._-]?key(?!store)",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@:]*:(?:[^/\s]*|(?!\d{1,5}/)[^\s,;]*?)(?=@)")  # a password may have a slash
_IN_TEXT = re.compile(
    r"""((?:password|passwd|pwd|secret|token|authorization|(?:api|access|account)[._-]?key)["']?\s*[=:]\s*"""
    r"""(?:(?:bearer|basic)\s+)?)("[^"]*"|'[^']*'|[^\s,;'"}]+)""",
    re.IGNORECASE,
)
T = TypeVar("T")


def masked(value: T) -> T:
    """`value` with every secret replaced, for printing and for errors.

    A secret is what stands under a name that says so, the user of a URL, and in other text what
    follows `password=` and the like; a foreign error's text can be searched no better than that.
    """
    result: Any = value
    if isinstance(value, dict):
        result = {name: MASK if _is_secret(name, item) else masked(item) for name, item in value.items()}
    elif isinstance(value, list):
        result = [masked(item) for item in value]
    elif isinstance(value, str):
        result = _IN_TEXT.sub(rf"\1{MASK}", _USER_INFO.sub(MASK, value))
    return result  # type: ignore[no-any-return]


def literal(value: Any, where: str = "") -> Iterator[str]:
    """The keys, joined by dots, of secrets that are written out instead of being `${...}` references."""
    if isinstance(value, dict):
        for name, item in value.items():
            if _is_secret(name, item) and "${" not in str(item):
                yield f"{where}{name}"
            else:
                yield from literal(item, f"{where}{name}.")
    elif isinstance(value, list):
        for item in value:
            yield from literal(item, where)
    elif isinstance(value, str) and "${" not in value and masked(value) != value:
        yield where.rstrip(".")


def _is_secret(name: object, value: object) -> bool:
    return value is not None and value != "" and _NAME.search(str(name)) is not None
