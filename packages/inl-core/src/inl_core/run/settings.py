"""Settings as data: what a YAML file, or a value on a command line, may hold.

A setting is a number, a text, a boolean, null, or a list or mapping of these. Nothing in a file
names code: there are no tags, classes or imports, and no aliases, whose expansion can be of any
size.
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from inl_core.run.errors import UserError
from inl_core.run.files import read_text
from inl_core.run.json_files import MAX_DEPTH, fits

MAX_SETTINGS_BYTES = 2**20
"""1 MiB, a hundred times the longest config of this project."""

Scalar = bool | int | float | str | None
Setting = bool | int | float | list[Scalar | list[Scalar | list[Scalar]]] | str | None
"""A value whose type the field leaves open: never an object."""


def check_yaml(text: str) -> None:
    """Refuse what is not plain data, before any of it is built.

    Raises:
        ValueError: It is not YAML, longer than `MAX_SETTINGS_BYTES`, nested deeper than
            `MAX_DEPTH`, or has a tag, an anchor, an alias, a repeated key or a key that is a list
            or a mapping.
    """
    if len(text) > MAX_SETTINGS_BYTES:
        raise ValueError(f"more than the limit of {MAX_SETTINGS_BYTES} bytes")
    try:
        _check_events(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _check_events(text: str) -> None:
    # One entry per open list or mapping: None, or the keys so far and whether a key is next.
    open_nodes: list[tuple[set[str], bool] | None] = []
    documents = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"{line}: anchors and aliases (& and *) are not read")
        if getattr(event, "tag", None):
            raise ValueError(f"{line}: tags such as {event.tag[:40]!r} are not read")  # pyright: ignore[reportAttributeAccessIssue]
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise ValueError("more than one document (`---`)")
        if isinstance(event, yaml.CollectionEndEvent):
            open_nodes.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        if open_nodes and (parent := open_nodes[-1]) is not None:
            keys, is_key = parent
            if is_key and not isinstance(event, yaml.ScalarEvent):
                raise ValueError(f"{line}: a key is a list or a mapping")
            if is_key and event.value in keys:  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(f"{line}: the key {event.value!r} occurs twice")  # pyright: ignore[reportAttributeAccessIssue]
            if is_key:
                keys.add(event.value)  # pyright: ignore[reportAttributeAccessIssue]
            open_nodes[-1] = (keys, not is_key)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((set(), True) if isinstance(event, yaml.MappingStartEvent) else None)
            if len(open_nodes) > MAX_DEPTH:
                raise ValueError(f"{line}: nested deeper than {MAX_DEPTH}")


def parse_yaml(text: str) -> Any:
    """Parse YAML that `check_yaml` admits."""
    check_yaml(text)
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except ValueError as error:  # a date such as 2020-13-01
        raise ValueError(" ".join(str(error).split())) from None


def settings_text(path: Path) -> str:
    """Read a YAML file of settings as text.

    Raises:
        UserError: It is not a readable regular file of fields and values, or `check_yaml` refuses
            it.
    """
    try:
        text = read_text(path, MAX_SETTINGS_BYTES, follow_links=True).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        if not isinstance(parse_yaml(text), dict):
            raise ValueError("expected fields and values, such as `steps: 100`")
    except ValueError as error:
        raise UserError(f"{path} cannot be read as settings: {error}") from None
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings, {name: value}; errors as `settings_text`."""
    return parse_yaml(settings_text(path))


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as 1e3, which the parser of the command lines reads as numbers."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), list("-+0123456789")
)


def dump_settings(values: dict[str, Any]) -> str:
    """Settings as the YAML of a config, from which the same values are read."""
    return yaml.dump(values, Dumper=_Dumper)


_hints = cache(get_type_hints)


def check_types(settings: Any) -> None:
    """Check that the fields of a dataclass have values of their types, choices among them.

    A config that is made in Python has no parser in front of it, and `flip="no"` would be true.

    Raises:
        UserError: Naming the field, its value and what was expected.
    """
    for field in fields(settings):
        value, kind = getattr(settings, field.name), _hints(type(settings))[field.name]
        finite = 0.0 if isinstance(value, float) and not math.isfinite(value) else value
        if not fits(finite, kind):  # other numbers are for `check_range`
            kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
            expected = " or ".join(plain_type(str(one)) for one in kinds)
            raise UserError(f"{field.name} is {value!r}; expected {expected}")


def plain_type(kind: str) -> str:
    """A type as Python prints it, in the words of a message."""
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)


def check_range(settings: object, interval: str, *names: str) -> None:
    """Check that numbers are finite and within an interval, such as "[0, 1)" or "(0, inf)".

    Fields that are None pass; of a tuple, a list or a mapping each number is checked.

    Raises:
        UserError: Naming the field, its value and what was expected.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name in names:
        value = getattr(settings, name)
        inner = value.values() if isinstance(value, dict) else value
        for number in inner if isinstance(inner, Iterable) else [inner]:
            if number is None or (
                math.isfinite(number)
                and (number > low or (number == low and interval[0] == "["))
                and (number < high or (number == high and interval[-1] == "]"))
            ):
                continue
            expected = f"a number in {interval}"
            if high == math.inf:
                more = "at least" if interval[0] == "[" else "more than"
                expected = "a finite number" if low == -math.inf else f"{more} {low:g}"
            raise UserError(f"{name} is {value}; expected {expected}")


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
