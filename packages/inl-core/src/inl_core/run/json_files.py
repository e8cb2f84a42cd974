"""JSON that a stranger may have written, read within limits.

A text that is too large or too deep, a key that occurs twice or a number out of range is a
`ValueError` with one sentence; the caller adds which file it is.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MAX_JSON_BYTES = 64 * 2**20
"""A million label names fit."""

MAX_DEPTH = 50
"""Lists and objects within each other."""

T = TypeVar("T")


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, over a limit, has a key twice, or NaN or an infinite number.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON, and at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        _check(value)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: As `parse_json`, or it is another value than an object.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        value = parse_json(file.read(MAX_JSON_BYTES + 1))
    if not isinstance(value, dict):
        raise ValueError(f"holds {_named(value)}, expected an object")
    return value


def unreadable(error: Exception) -> str:
    """What an exception that is not the parser's own says about settings."""
    if isinstance(error, TypeError) and "must be a mapping" in str(error):
        return (
            "a group of settings (such as data or optim) is null or one value: give it fields, "
            "or leave it out"
        )
    if isinstance(error, UnicodeDecodeError):
        return f"the settings are not UTF-8 ({error.reason} at byte {error.start})"
    return f"the settings cannot be read ({type(error).__name__}: {str(error)[:500]})"


def filled(cls: type[T], values: Any) -> T:
    """A dataclass from what a JSON file holds.

    Raises:
        ValueError: `values` is no object, lacks a field, has an unknown one, or a value of the
            wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"holds {_named(values)}, expected an object")
    kinds = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown field {name!r}; the fields are {', '.join(known)}")
        if not fits(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", None) or str(kinds[name])
            raise ValueError(f"{name} is {_named(value)}, expected {kind}")
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name not in values and field.default is field.default_factory is MISSING:
            raise ValueError(f"no {field.name}")
    return cls(**values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of an annotated type; a whole number is a float too."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(
            fits(k, inner[0]) and fits(v, inner[1]) for k, v in pairs
        )
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < 1e300
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, NoneType if kind is None else kind)


def printable(text: str) -> str:
    """A message for a terminal: control characters are written out, line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A name for a caption: without line ends and control characters."""
    return " ".join(printable(text).split())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _check(value: Any) -> None:
    """No deeper than `MAX_DEPTH`, and no number that only overflow made infinite."""
    level: Iterable[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
            elif isinstance(one, float) and not math.isfinite(one):
                raise ValueError("a number is beyond what a float can hold")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _named(value: Any) -> str:
    """A value for a message: short, and of one line."""
    shown = ascii(value) if isinstance(value, str | int | float | bool | None) else ""
    return shown[:60] if shown else f"a {type(value).__name__}"
