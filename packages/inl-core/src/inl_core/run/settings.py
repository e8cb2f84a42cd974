"""Settings as data: YAML and words of a command line become values of dataclasses.

A setting is a number, a text, a boolean, or a list or mapping of these. Nothing in a file or on a
command line names code: there are no tags, classes or imports, and no aliases, whose expansion can
be of any size. A value is read by the type of its field, so that a text such as `no`, `010` or
`1e3` stays what it is where a text is expected.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from inl_core.run.errors import UserError
from inl_core.run.files import read_text
from inl_core.run.json_files import MAX_DEPTH

MAX_SETTINGS_BYTES = 2**20
"""1 MiB, a hundred times the longest config of this project."""

Scalar = bool | int | float | str | None
Setting = Scalar | list[Scalar | list[Scalar | list[Scalar]]]
"""A value whose type the field leaves open: never an object."""

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Plain(str):
    """A text without quotes: a number, boolean or null if the field expects one."""


class Word(Plain):
    """A word of a command line: a text as it stands, or the YAML of a value of another type."""


def parse_yaml(text: str) -> Any:
    """Parse YAML into lists, mappings and texts; `Plain` ones are still to be converted.

    Raises:
        ValueError: It is not YAML, longer than `MAX_SETTINGS_BYTES`, nested deeper than
            `MAX_DEPTH`, or has a tag, an anchor, an alias, a repeated key or a key that is not
            a text.
    """
    if len(text) > MAX_SETTINGS_BYTES:
        raise ValueError(f"more than the limit of {MAX_SETTINGS_BYTES} bytes")
    try:
        events = yaml.parse(str(text), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        documents = [
            _node(next(events), events, 0)
            for event in events
            if isinstance(event, yaml.DocumentStartEvent)
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if len(documents) > 1:
        raise ValueError("more than one document (`---`)")
    return documents[0] if documents else Plain()


def _node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
    """The value that starts with `event`."""
    line = f"line {event.start_mark.line + 1}"
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        raise ValueError(f"{line}: anchors and aliases (& and *) are not read, repeat the value")
    if getattr(event, "tag", None):
        raise ValueError(f"{line}: tags such as {event.tag[:40]!r} are not read")  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(event, yaml.ScalarEvent):
        return str(event.value) if event.style else Plain(event.value)
    if depth == MAX_DEPTH:
        raise ValueError(f"{line}: nested deeper than {MAX_DEPTH}")
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(inner := next(events), yaml.SequenceEndEvent):
            items.append(_node(inner, events, depth + 1))
        return items
    values: dict[str, Any] = {}
    while not isinstance(inner := next(events), yaml.MappingEndEvent):
        key = _node(inner, events, depth + 1)
        if not isinstance(key, str):
            raise ValueError(f"line {inner.start_mark.line + 1}: a key is a list or a mapping")
        if key in values:
            raise ValueError(f"line {inner.start_mark.line + 1}: the key {key!r} occurs twice")
        values[str(key)] = _node(next(events), events, depth + 1)
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings, {name: value}.

    Raises:
        UserError: It is not a readable regular file, or `parse_yaml` refuses it.
    """
    try:
        text = read_text(path, MAX_SETTINGS_BYTES, follow_links=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        values = parse_yaml(text.removeprefix("\ufeff"))
        if not isinstance(values, dict):
            raise ValueError("expected fields and values, such as `steps: 100`")
    except ValueError as error:
        raise UserError(f"{path} cannot be read as settings: {error}") from None
    return values


def store(
    values: dict[str, Any], kinds: Mapping[str, Any], name: str, value: Any, group: str = ""
) -> None:
    """Convert a value to the type of its field and put it into the nested `values`.

    Args:
        values: Settings so far, nested like the dataclasses.
        kinds: Types of the fields, by name; dataclasses are groups.
        name: Dotted name, within `group`: a field, a group, or a key of a field that is a mapping.
        value: A text of `parse_yaml`, a `Word`, or lists and mappings of texts.
        group: Dotted name of the group, for messages.

    Raises:
        UserError: There is no such field, or the value does not have its type.
    """
    head, _, rest = name.partition(".")
    full = f"{group}.{head}" if group else head
    if head not in kinds:
        inside = f".{next(iter(value))}" if isinstance(value, dict) and value else ""
        raise UnknownField(f"{full}{f'.{rest}' if rest else ''}{inside}")
    kind, old = kinds[head], values.get(head)
    if isinstance(value, Word) and not rest and str not in alternatives(kind):
        value = _parsed(value, full)
    items = {rest: value} if rest else value
    if (cls := group_class(kind)) is not None:
        if isinstance(items, dict):
            values[head] = old or {}
            for key, one in items.items():
                store(values[head], get_type_hints(cls), key, one, full)
        elif isinstance(value, Plain) and value in _NULLS and NoneType in alternatives(kind):
            values[head] = None
        else:
            example = dataclasses.fields(cls)[0].name
            raise UserError(
                f"{full} is {_shown(value)}; expected fields, such as {{{example}: ...}}"
            )
    elif isinstance(items, dict) and (inner := mapping_values(kind)):
        kept = old if rest and isinstance(old, dict) else {}
        values[head] = kept | {k: _checked(v, inner[0], f"{full}.{k}") for k, v in items.items()}
    elif rest:
        raise UnknownField(f"{full}.{rest}")
    else:
        values[head] = _checked(value, kind, full)


class UnknownField(Exception):
    """There is no field of this dotted name."""


def built(kind: Any, value: Any) -> Any:
    """The value of a field: an instance of a group's dataclass, else the value itself.

    Args:
        kind: Type of the field.
        value: A result of `store`; fields of a group that it leaves out have their defaults.
    """
    cls = group_class(kind)
    if cls is None or value is None:
        return value
    kinds = get_type_hints(cls)
    return cls(**{name: built(kinds[name], one) for name, one in value.items()})


def group_class(kind: Any) -> type | None:
    """The dataclass of a field that is a group, or may be one; None for other fields."""
    found = [one for one in alternatives(kind) if dataclasses.is_dataclass(one)]
    return found[0] if found else None  # pyright: ignore[reportReturnType]


def mapping_values(kind: Any) -> list[Any]:
    """The types of the values of a field that is, or may be, a mapping."""
    return [get_args(one)[1] for one in alternatives(kind) if get_origin(one) is dict]


def alternatives(kind: Any) -> Sequence[Any]:
    """The types of which a field takes any."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


class _Misfit(Exception):
    """A value that does not have the type of its field."""


def _checked(value: Any, kind: Any, name: str) -> Any:
    try:
        return _converted(value, kind)
    except _Misfit:
        raise UserError(f"{name} is {_shown(value)}; expected {described(kind)}") from None


def _parsed(word: Word, name: str) -> Any:
    try:
        return parse_yaml(word)
    except ValueError as error:
        raise UserError(f"{name} is {_shown(word)}: {error}") from None


def _converted(value: Any, kind: Any) -> Any:
    """A text or nested texts as `kind`: as null, a name, a boolean, a number, else as a text."""
    parsed = value
    if isinstance(value, Word):
        with suppress(ValueError):  # it is a text then
            parsed = parse_yaml(value)
    kinds = alternatives(kind)
    if isinstance(parsed, str) and not isinstance(parsed, Plain):  # quoted
        kinds = sorted(kinds, key=lambda one: one is not str)
    else:
        order = [NoneType, Literal, bool, int, float, list, tuple, dict, str]
        kinds = sorted(kinds, key=lambda one: order.index(get_origin(one) or one))
    for one in kinds:
        try:
            return _as(value if one is str else parsed, one)
        except _Misfit:
            continue
    raise _Misfit


def _as(value: Any, kind: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal and value in inner:
        return str(value)
    if origin is list and isinstance(value, list):
        return [_converted(one, inner[0]) for one in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(_converted(one, each) for one, each in zip(value, inner, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _converted(one, inner[1]) for key, one in value.items()}
    if not isinstance(value, str):
        raise _Misfit
    if kind is str and (type(value) is not Plain or value not in _NULLS):
        return str(value)
    if kind is NoneType and isinstance(value, Plain) and value in _NULLS:
        return None
    if kind is bool and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if kind is int and _INTEGER.fullmatch(value) and len(value) < 20 and abs(int(value)) < 2**63:
        return int(value)
    if kind is float and _NUMBER.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    raise _Misfit


def described(kind: Any) -> str:
    """What a field expects, in words."""
    words = []
    for one in alternatives(kind):
        origin = get_origin(one)
        if origin is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(one)))}")
        elif origin is list and len(inner := alternatives(get_args(one)[0])) == 1:
            words.append(f"list of {described(inner[0])}")
        else:
            names = {NoneType: "null", str: "text", dict: "mapping"}
            words.append(names.get(origin or one, (origin or one).__name__))
    return " or ".join(dict.fromkeys(words))


def _shown(value: Any) -> str:
    """A value for a message: one line of at most 60 characters."""
    if isinstance(value, str):
        text = ascii(str(value))
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, dict):
        return f"a mapping of {ascii(', '.join(value))[1:-1][:60]}" if value else "an empty mapping"
    return f"a list of {ascii(', '.join(map(str, value)))[1:-1][:60]}" if value else "an empty list"


def all_names(kinds: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields, groups left out."""
    for name, kind in kinds.items():
        cls = group_class(kind)
        if cls is None:
            yield f"{prefix}{name}"
        else:
            yield from all_names(get_type_hints(cls), f"{prefix}{name}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest names: in the same group, else by their last part (`lr` for `optim.lr`)."""
    group, _, last = word.rpartition(".")
    known = list(known)
    for names in ([name for name in known if name.rpartition(".")[0] == group], known):
        by_last: dict[str, list[str]] = {}
        for name in names:
            by_last.setdefault(name.rpartition(".")[2], []).append(name)
        close = difflib.get_close_matches(last, by_last, n=2, cutoff=0.65)
        near = [name for end in ([last] if last in by_last else close) for name in by_last[end]]
        if near:
            return f": did you mean {' or '.join(near[:3])}?"
    return ""


def field_help(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those it extends, on one line."""
    inherited = [field_help(base) for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    return {k: v for texts in inherited for k, v in texts.items()} | {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(field.target, ast.Name)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
