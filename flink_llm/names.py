"""Messages about names that do not exist, with the one that was probably meant."""

import difflib
from collections.abc import Iterable


def unknown(where: str, name: str, known: Iterable[str]) -> str:
    """One line: what is unknown, where, and the nearest known name or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return f"{where}: unknown name {name!r}; {hint}"
