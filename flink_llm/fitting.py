"""Plain values made into a frozen section of settings, part by part, so that an error names the very key."""

import math
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import yaml
from msgspec import Struct

from flink_llm import config_file
from flink_llm.errors import ConfigError
from flink_llm.names import unknown

S = TypeVar("S", bound=Struct)


def fitted(raw: Any, kind: type[S], whole: str) -> S:
    """`raw` as a `kind`; `whole` is what the whole is called. Raises ConfigError, one line naming the key."""
    fits = _fitted(raw, kind, "", whole)
    try:
        return msgspec.convert(fits, kind)
    except msgspec.ValidationError as error:  # a key that is missing: all that is there fits
        text, _, path = str(error).partition(" - at `$")
        raise ConfigError(f"{path.rstrip('`').lstrip('.') or whole}: {_plain(text)}") from error


def _fitted(value: Any, kind: Any, where: str, whole: str) -> Any:
    """`value` checked against the type `kind` part by part, so that an error names the very key.

    Texts stay as they are but for references, which may stand for numbers; a map of texts takes other
    scalars too, written as YAML writes them.
    """
    for option in _options(kind):
        if isinstance(value, dict) and isinstance(option, type) and issubclass(option, Struct):
            fields = {field.name: field for field in msgspec.structs.fields(option)}
            for name in value.keys() - fields:
                raise ConfigError(unknown(where or whole, name, fields))
            kept = {name: item for name, item in value.items() if fields[name].required or not _is_unset(item)}
            return {name: _fitted(item, fields[name].type, _below(where, name), whole) for name, item in kept.items()}
        if isinstance(value, dict) and (option is Any or get_origin(option) is dict):
            of = Any if option is Any else get_args(option)[1]
            texts = {name: _as_text(item) if of is str else item for name, item in value.items()}
            return {name: _fitted(item, of, _below(where, name), whole) for name, item in texts.items()}
        if isinstance(value, list) and (option is Any or get_origin(option) is list):
            of = Any if option is Any else get_args(option)[0]
            return [_fitted(item, of, f"{where}[{number}]", whole) for number, item in enumerate(value)]
    return _scalar(value, kind, where, whole)


def _scalar(value: Any, kind: Any, where: str, whole: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {value} is no number to work with")
    try:
        return msgspec.convert(str(value) if isinstance(value, str) else value, kind)
    except msgspec.ValidationError as error:
        if isinstance(value, config_file.Referenced):
            read = yaml.safe_load(value)
            if not isinstance(read, str):
                return _scalar(read, kind, where, whole)
        raise ConfigError(_refused(value, kind, where or whole, str(error))) from error


def _refused(value: Any, kind: Any, where: str, otherwise: str) -> str:
    choices = [choice for option in _options(kind) if get_origin(option) is Literal for choice in get_args(option)]
    if choices:
        return unknown(where, value, choices)
    if bool in _options(kind):
        return f"{where}: write true or false, without quotes"
    return f"{where}: {otherwise}"


def _plain(text: str) -> str:
    """What msgspec says of a key that is missing, in YAML's words."""
    _, missing, key = text.partition("missing required field ")
    return f"the key {key} is missing: add it" if missing else text


def _options(kind: Any) -> list[Any]:
    """The types that a union is made of, without what `Annotated` adds to them."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]


def _as_text(item: Any) -> Any:
    return item if item is None or isinstance(item, (str, dict, list)) else str(item).lower()


def _is_unset(item: Any) -> bool:
    return isinstance(item, config_file.Unset) or (isinstance(item, list) and any(_is_unset(each) for each in item))


def _below(where: str, name: str) -> str:
    return f"{where}.{name}".lstrip(".")
