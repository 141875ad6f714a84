"""A configuration file as plain values: YAML read strictly, references replaced.

`${NAME}` stands for an environment variable and `${file:PATH}` for a file's content, PATH relative to
the YAML file; `$${` is a plain `${`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flink_llm.errors import ConfigError

_REFERENCE = re.compile(r"\$\$\{|\$\{(file:)?([^}]*)\}")


class Referenced(str):
    """A value that was one reference and nothing else: where a number is wanted, it is read as one."""


class Unset(str):
    """A value whose environment variable or file is not there, as it was written."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """The file's values, references as they are. Raises ConfigError, one line."""
    return mapping(path, "a configuration is a mapping with at least `job` and `name`")


def mapping(path: Path, otherwise: str) -> dict[str, Any]:
    """The file's values; `otherwise` says what they should be if they are no mapping. Raises ConfigError, one line."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; correct the path") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}{_place(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, impossible dates
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: {otherwise}")
    return raw


def _place(error: yaml.MarkedYAMLError) -> str:
    """Where the YAML goes wrong, and what a brace there most often means."""
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    hint = '; quote a reference: "${NAME}"' if "'{'" in (error.problem or "") else ""
    return f"{where} is not YAML: {error.problem or error.context}{hint}"


def resolve(raw: dict[str, Any], folder: Path, environ: Mapping[str, str], *, strict: bool = True) -> dict[str, Any]:
    """`raw` with every reference replaced. Raises ConfigError naming the key.

    Not `strict`: a value whose environment variable or file is not there is left as an `Unset`.
    """

    def replaced(text: str, where: str) -> str:
        unset = []

        def one(found: re.Match[str]) -> str:
            if found[0] == "$${":
                return "${"
            value = _content(folder / found[2], where, strict) if found[1] else environ.get(found[2])
            if value is None:
                unset.append(found[2])
            return value or ""

        result = _REFERENCE.sub(one, text)
        if unset and strict:
            raise ConfigError(f"{where}: the environment variable {unset[0]} is not set: export {unset[0]}=...")
        if unset:
            return Unset(text)
        whole = _REFERENCE.fullmatch(text)
        return Referenced(result) if whole is not None and whole[0] != "$${" else result

    try:
        made: dict[str, Any] = _mapped(raw, replaced)
    except RecursionError as error:
        raise ConfigError("configuration: an anchor holds itself") from error
    return made


def moved(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` for a file in another folder: the paths of `${file:PATH}` made absolute, nothing replaced."""

    def one(found: re.Match[str]) -> str:
        return f"${{file:{(folder / found[2]).absolute()}}}" if found[1] else found[0]

    made: dict[str, Any] = _mapped(raw, lambda text, _: _REFERENCE.sub(one, text))
    return made


def _mapped(value: Any, change: Any, where: str = "") -> Any:
    if isinstance(value, dict):
        return {str(name): _mapped(item, change, f"{where}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change, f"{where}[{number}]") for number, item in enumerate(value)]
    return change(value, where) if isinstance(value, str) else value


def _content(path: Path, where: str, strict: bool) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if not strict:
            return None
        raise ConfigError(f"{where}: {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {path} is not a text file") from error
