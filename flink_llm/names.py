"""Messages about names that do not exist or that nobody takes."""

import difflib
import re
from collections.abc import Iterable

from flink_llm.errors import ConfigError

_TOPIC = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")
_MODEL = re.compile(r"(?!\.)[A-Za-z0-9._-]+")


def unknown(where: str, name: object, known: Iterable[str]) -> str:
    """One line: what is unknown, where, and the nearest known name or all of them."""
    names = sorted(known)
    near = nearest(str(name), names)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return f"{where}: unknown name {name!r}; {hint}"


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `known` that `name` may be a slip of, if they are so much alike, 0 to 1."""
    near = difflib.get_close_matches(name, sorted(known), 1, likeness)
    return near[0] if near else None


def check_topic(where: str, name: str) -> None:
    """Raises ConfigError for a topic name that no broker takes."""
    if _TOPIC.fullmatch(name) is None:
        raise ConfigError(f"{where}: no broker takes {name!r}: at most 249 letters, digits, '.', '_' and '-'")


def check_model(where: str, name: str) -> None:
    """Raises ConfigError for a model name that cannot be a folder's name everywhere."""
    if _MODEL.fullmatch(name) is None:
        raise ConfigError(f"{where}: {name!r} is no model name: letters, digits, '.', '_' and '-', no '.' in front")
