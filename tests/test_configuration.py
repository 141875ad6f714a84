"""docs/configuration.md names every key with its default, and none that is not there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Struct

from flink_llm.config import JobConfig
from flink_llm.engine.deployment import Deployment

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([a-z][a-z_.\[\]]*)` \| (`?)(.+?)\2 \| (.+) \|$", re.MULTILINE)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return "none" if value in (None, "") else str(value)


def default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    return shown(field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory())


def struct(kind: Any) -> tuple[type[Struct], str] | None:
    """The section that a key holds, and what stands behind the key for its keys."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        return kind, "."
    for part in get_args(kind):
        found = struct(part)
        if found is not None:
            return found[0], "[]." if getattr(kind, "__origin__", None) is list else found[1]
    return None


def keys(kind: type[Struct], where: str = "") -> Iterator[tuple[str, str]]:
    for field in msgspec.structs.fields(kind):
        inner = struct(field.type)
        if inner is None or field.required or field.default is None:  # a section that is always there is no row
            yield where + field.name, default(field)
        if inner is not None:
            yield from keys(inner[0], f"{where}{field.name}{inner[1]}")


def test_every_key_stands_there_with_its_default():
    rows = ROW.findall(PAGE.read_text())
    expected = dict([*keys(JobConfig), *keys(Deployment)])
    expected.pop("features")  # said above its table
    assert {"chat.mask", "versions[].canary.window", "files.requests"} <= set(expected)
    assert {key: value for key, _, value, _ in rows} == expected
    assert len(rows) == len(expected)


def test_values_are_marked_as_code_and_words_are_not():
    assert {value for _, mark, value, _ in ROW.findall(PAGE.read_text()) if not mark} == {"none", "required"}
