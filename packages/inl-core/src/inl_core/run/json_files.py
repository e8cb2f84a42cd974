"""JSON from untrusted sources, read within limits, and text from it for messages.

Errors are a `ValueError` with one sentence; the caller adds the name of the file.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from inl_core.run.files import read_bytes

MAX_JSON_BYTES = 64 * 2**20
"""64 MiB: enough for a million label names."""

MAX_DEPTH = 50
"""Nesting of lists and objects."""

T = TypeVar("T")


def parse_json(text: bytes | str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: It is not JSON, over `MAX_JSON_BYTES` or `MAX_DEPTH`, repeats a key, or has NaN
            or an infinite number.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON, more than the limit of {MAX_JSON_BYTES}")
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_reject)
        _check_limits(value)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    return value


def read_json_object(path: Path, follow_links: bool = True) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        follow_links: Whether it may be a symbolic link, as in the cache of the Hub.

    Raises:
        ValueError: As `parse_json` and `read_bytes`, or the value is not an object.
        OSError: The file cannot be read.
    """
    value = parse_json(read_bytes(path, MAX_JSON_BYTES, follow_links))
    if not isinstance(value, dict):
        raise ValueError(f"holds {_short(value)}, expected an object")
    return value


def without_retired(values: Mapping[str, Any], retired: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out fields that earlier versions wrote and this one does not have.

    Args:
        values: Fields as they were written.
        retired: {field: the value at which it did nothing}; `...` for one that alone does nothing.

    Raises:
        ValueError: One of them did something.
    """
    for name in retired.keys() & values.keys():
        if retired[name] is not ... and values[name] != retired[name]:
            raise ValueError(
                f"{name} is {_short(values[name])}: that was removed, as it showed no use in any "
                "measurement; use the version that wrote it"
            )
    return {name: value for name, value in values.items() if name not in retired}


def filled(cls: type[T], values: Any) -> T:
    """Build a dataclass from a parsed JSON object; `cls.RETIRED` are fields to leave out.

    Raises:
        ValueError: `values` is not an object, lacks a field, or has an unknown one or a value of
            the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"holds {_short(values)}, expected an object")
    values = without_retired(values, getattr(cls, "RETIRED", {}))
    kinds = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"unknown field {name!r}; the fields are {', '.join(names)}")
        if not fits(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", None) or str(kinds[name])
            raise ValueError(f"{name} is {_short(value)}, expected {kind}")
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name not in values and field.default is field.default_factory is MISSING:
            raise ValueError(f"no {field.name}")
    return cls(**values)


def fits(value: Any, kind: Any) -> bool:
    """Whether a parsed JSON value has the annotated type `kind`; an integer is a float too."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and (
            len(value) == len(inner) and all(map(fits, value, inner))
        )
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
    """Escape the control characters of a terminal message, except line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Put a name on one line for a caption, control characters escaped."""
    return " ".join(printable(text).split())


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice")
    return value


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _check_limits(value: Any) -> None:
    """Raise for nesting deeper than `MAX_DEPTH` and for numbers that overflowed to infinity."""
    level: Iterable[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
            elif isinstance(one, float) and not math.isfinite(one):
                raise ValueError("a number is too large for a float")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _short(value: Any) -> str:
    """A value for a message: one line of at most 60 characters."""
    if isinstance(value, str | int | float | bool | None):
        return ascii(value)[:60]
    return f"a {type(value).__name__}"
