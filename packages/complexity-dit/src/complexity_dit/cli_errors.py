"""Wrong options in plain words: what was written, what was expected, what was probably meant."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from jsonargparse import ArgumentParser

from complexity_dit.config import DataConfig

_UNKNOWN = re.compile(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted")
"""How the parser reports an unknown field of a YAML, and one inside an optional group."""


def explain(message: str, arguments: Sequence[str], commands: Mapping[str, ArgumentParser]) -> str:
    """Say what is wrong with a command line or the YAML it names.

    Args:
        message: What the parser said.
        arguments: What it was given.
        commands: The parser of each command.

    Returns:
        One line that names the value, what was expected, and the nearest names.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is None:
        return f"no command: choose one of {', '.join(commands)}"
    if command not in commands:
        names = ", ".join(commands)
        return f"unknown command {command!r}{_meant(command, commands)}; the commands are {names}"
    help_line = f"see complexity-dit {command} --help"
    unknown = [name for found in _UNKNOWN.findall(message) for name in found if name]
    group = re.match(r'Parser key "([^"]+)"', message)
    if unknown and group:
        unknown = [f"{group[1]}.{name}" for name in unknown]
    if message.startswith("unrecognized arguments:"):
        words = message.partition(":")[2].split()
        unknown = [w.lstrip("-").partition("=")[0] for w in words if w.startswith("--")]
        if not unknown:
            return f"{command} takes no {' '.join(words)!r}; {help_line}"
    if unknown:
        names = field_names(commands[command])
        told = [f"unknown field {name!r}{_meant(name, names)}" for name in unknown]
        return f"{'; '.join(told)}; {help_line}"
    return f"{_wrong_value(message)}; {help_line}"


def field_names(parser: ArgumentParser) -> list[str]:
    """The dotted names of all fields of a command."""
    names = []
    for name, _ in parser.get_defaults().items():
        names.append(name)
        if name == "data":  # a group that may be left out has no default fields
            names += [f"data.{field.name}" for field in dataclasses.fields(DataConfig)]
    return names


def _meant(word: str, known: Iterable[str]) -> str:
    """The nearest names: in the same group, else those that end alike (`lr` for `optim.lr`)."""
    group, _, last = word.rpartition(".")
    mine = [name for name in known if name.rpartition(".")[0] == group]
    for names in (mine, list(known)):
        ends: dict[str, list[str]] = {}
        for name in names:
            ends.setdefault(name.rpartition(".")[2], []).append(name)
        close = difflib.get_close_matches(last, ends, n=2, cutoff=0.65)
        near = [name for end in ([last] if last in ends else close) for name in ends[end]]
        if near:
            return f": did you mean {' or '.join(near[:3])}?"
    return ""


def _wrong_value(message: str) -> str:
    """A value of the wrong type, from the parser's page about it."""
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    expected = [_plain(kind) for kind in re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", message)]
    if key and given and expected:
        return f"{key[1]} is {given[1].strip()!r}; expected {' or '.join(expected)}"
    text = message[key.end() :] if key else message
    return (f"{key[1]}: " if key else "") + "; ".join(
        line.strip(" -:") for line in text.splitlines() if line.strip()
    )


def _plain(kind: str) -> str:
    kind = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)
