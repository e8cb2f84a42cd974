"""A program as a table of commands: words become typed settings, errors become one line.

Options and their help come from dataclasses, which load nothing heavy. A command imports the code
that does its work when it runs, so that help pages stay fast.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from inl_core.run.errors import RunStopped, UserError
from inl_core.run.json_files import printable
from inl_core.run.settings import (
    UnknownField,
    Word,
    all_names,
    alternatives,
    built,
    field_help,
    group_class,
    mapping_values,
    nearest,
    read_settings,
    store,
)

_NO_BARS = (
    "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS",
)  # fmt: skip
"""What tqdm and the libraries around it read when they are imported."""

REQUIRED = ...
"""Default of an option that must be given."""


@dataclass(frozen=True)
class Option:
    """An option that is no field of a dataclass, or a word without a name.

    Attributes:
        help: Its line in the help.
        default: Value if it is not given.
        kind: Type of the value.
    """

    help: str
    default: Any = REQUIRED
    kind: Any = str


def options_of(cls: type, with_help: bool = False) -> dict[str, Option]:
    """The fields of a dataclass as options; their help is read from its source."""
    texts, kinds = field_help(cls) if with_help else {}, get_type_hints(cls)
    return {
        one.name: Option(
            texts.get(one.name, ""),
            one.default if one.default_factory is MISSING else one.default_factory(),
            kinds[one.name],
        )
        for one in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    }


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        about: Its line in the help.
        run: Called with an instance of each of `configs`, then the other options by name.
        arguments: Words without a name, in their order.
        options: Options of its own.
        configs: Dataclasses whose fields are options.
        groups: Dataclasses whose fields are options with a prefix: {prefix: class}.
        skip: Fields of `configs` that are not options.
        defaults: Defaults that differ from those of `configs`.
        has_config: Whether `--config FILE` reads options from YAML.
        renamed: Former names of options: {former: present}.
    """

    about: str
    run: Callable[..., None]
    arguments: Mapping[str, Option] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    configs: Sequence[type] = ()
    groups: Mapping[str, type] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    has_config: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def fields(self, with_help: bool = False) -> dict[str, Option]:
        """All options, by name."""
        found = dict(self.options)
        for config in self.configs:
            options = options_of(config, with_help)
            found |= {name: one for name, one in options.items() if name not in self.skip}
        for name, value in self.defaults.items():
            found[name] = dataclasses.replace(found[name], default=value)
        return found | {name: Option("", cls(), cls) for name, cls in self.groups.items()}

    def parse(self, words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        """Instances of `configs`, and the other options by name, from the words of a command line.

        Raises:
            UserError: Naming what is wrong, what was expected and the nearest names.
        """
        options = {**self.arguments, **self.fields()}
        kinds = {name: option.kind for name, option in options.items()}
        values: dict[str, Any] = {}
        free, rest = list(self.arguments), list(words)
        try:
            while rest:
                word = rest.pop(0)
                if word.startswith("--"):
                    for name, value in self._option(word[2:], rest, kinds):
                        store(values, kinds, self.renamed.get(name, name), value)
                elif free:
                    store(values, kinds, free.pop(0), Word(word))
                else:
                    raise UserError(f"there is no argument for {word!r}")
        except UnknownField as error:
            near = nearest(str(error), all_names(kinds))
            raise UserError(f"unknown field {str(error)!r}{near}") from None
        missing = [
            name if name in self.arguments else f"--{name}"
            for name, option in options.items()
            if name not in values and option.default is REQUIRED
        ]
        if missing:
            raise UserError(f"missing: {' and '.join(missing)}")
        chosen = {
            name: built(option.kind, values[name]) if name in values else option.default
            for name, option in options.items()
        }
        configs = []
        for config in self.configs:
            names = [one.name for one in dataclasses.fields(config)]
            configs.append(config(**{name: chosen.pop(name) for name in names if name in chosen}))
        return configs, chosen

    def _option(
        self, word: str, rest: list[str], kinds: Mapping[str, Any]
    ) -> Iterable[tuple[str, Any]]:
        """Names and values that an option sets; a value of its own is taken from `rest`."""
        name, equals, text = word.partition("=")
        from_file = self.has_config and name == "config"
        head, _, key = name.partition(".")
        if not from_file and self.renamed.get(head, head) not in kinds:
            raise UnknownField(name)
        # --labels.style A B: a mapping of lists takes words up to the next option.
        several = key and any(get_origin(one) is list for one in mapping_values(kinds.get(head)))
        given = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--") and (several or not given):
            given.append(rest.pop(0))
        if not given:
            raise UserError(f"--{name} has no value")
        if from_file:
            return read_settings(Path(given[0])).items()
        return [(name, [Word(one) for one in given] if several else Word(given[0]))]

    def describe(self, parser: argparse.ArgumentParser) -> None:
        """Add the options to a parser of argparse, for the help page and for completion."""
        for name, option in self.arguments.items():
            parser.add_argument(name, help=_escaped(option.help))
        if self.has_config:
            parser.add_argument("--config", metavar="FILE", help="YAML with any of these options")
            parser.add_argument(
                "--print_config", action="store_true", help="print all settings as YAML, and exit"
            )
        _describe(parser, self.fields(with_help=True))


def _describe(parser: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Add options, and each group of options under a heading of its own."""

    def add(target: Any, options: Mapping[str, Option], prefix: str) -> None:
        groups = {name: cls for name, one in options.items() if (cls := group_class(one.kind))}
        for name, option in options.items():
            if name in groups:
                continue
            default = "(required)" if option.default is REQUIRED else _default(option.default)
            literal = get_origin(option.kind) is Literal
            target.add_argument(
                f"--{prefix}{name}",
                choices=get_args(option.kind) if literal else None,
                metavar=None if literal else _METAVARS.get(alternatives(option.kind)[0], "VALUE"),
                help=_escaped(f"{option.help} {default}"),
            )
        for name, cls in groups.items():
            words = options[name].help or (cls.__doc__ or "").partition("\n")[0]
            group = parser.add_argument_group(f"{prefix}{name}", _escaped(words))
            add(group, options_of(cls, with_help=True), f"{prefix}{name}.")

    add(parser, options, "")


_METAVARS = {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT"}


def _default(value: Any) -> str:
    """The default in the help, as it would be written on the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"(default: {text.removesuffix('...' + chr(10)).strip()})"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


@dataclass(frozen=True)
class Program:
    """A program of several commands.

    Attributes:
        name: What it is called in a shell.
        about: Its line in the help.
        version: Of the package.
        commands: {name: command}.
    """

    name: str
    about: str
    version: str
    commands: Mapping[str, Command]

    def parse(self, words: Sequence[str]) -> tuple[str, list[Any], dict[str, Any]]:
        """Parse a command line without running it.

        Returns:
            The command, its configs, and its other options by name.

        Raises:
            UserError: Naming what is wrong, what was expected and the nearest names.
        """
        name, command = self._command(words)
        try:
            return name, *command.parse(words[1:])
        except UserError as error:
            raise UserError(f"{error}; see {self.name} {name} --help") from None

    def _command(self, words: Sequence[str]) -> tuple[str, Command]:
        known = ", ".join(self.commands)
        if not words or words[0].startswith("-"):
            raise UserError(f"no command: choose one of {known}")
        if words[0] not in self.commands:
            near = nearest(words[0], self.commands)
            raise UserError(f"unknown command {words[0]!r}{near}; the commands are {known}")
        return words[0], self.commands[words[0]]

    def run(self, words: Sequence[str]) -> None:
        """Parse and run one command, or print what `--help` and the like ask for."""
        first, _, value = words[0].partition("=") if words else ("", "", "")
        if first in ("-h", "--help", "--version", "--print_completion"):
            self._print(first, value or " ".join(words[1:]))
            raise SystemExit(0)
        name, command = self._command(words)
        if {"-h", "--help"} & set(words):
            self._parser([name]).parse_args([name, "--help"])
        asked = command.has_config and "--print_config" in words
        _, configs, options = self.parse([word for word in words if word != "--print_config"])
        if asked:
            settings = [item for one in configs for item in dataclasses.asdict(one).items()]
            print(yaml.safe_dump(dict(settings) | options, sort_keys=False), end="")
            raise SystemExit(0)
        command.run(*configs, **options)

    def _print(self, what: str, value: str) -> None:
        if what == "--version":
            print(f"{self.name} {self.version}")
        elif what == "--print_completion":
            try:
                import shtab
            except ImportError:
                raise UserError("completion needs the package shtab: pip install shtab") from None
            shell = value.removeprefix("shtab-")
            if shell not in shtab.SUPPORTED_SHELLS:
                known = " or ".join(f"shtab-{one}" for one in shtab.SUPPORTED_SHELLS)
                raise UserError(f"--print_completion is {value!r}; expected {known}")
            print(shtab.complete(self._parser(self.commands), shell=shell))
        else:
            self._parser([]).print_help()

    def _parser(self, with_options: Iterable[str]) -> argparse.ArgumentParser:
        """A parser of argparse, for help pages and completion only."""
        parser = argparse.ArgumentParser(prog=self.name, description=_escaped(self.about))
        parser.add_argument("--version", action="store_true", help="print the version, and exit")
        parser.add_argument(
            "--print_completion", metavar="shtab-SHELL", help="print a script for the shell"
        )
        commands = parser.add_subparsers(title="commands", metavar="COMMAND")
        for name, command in self.commands.items():
            words = " ".join(one.upper() for one in command.arguments)
            page = commands.add_parser(
                name,
                help=_escaped(command.about),
                description=_escaped(command.about),
                usage=f"{self.name} {name} {words} [--OPTION VALUE ...]",
            )
            if name in with_options:
                command.describe(page)
        return parser

    def main(self, quiet: Sequence[str] = ()) -> None:
        """Run the command of `sys.argv`; report errors in one line and set the exit status.

        The status is 2 for wrong input, 128 + the signal for a training that was stopped by a
        signal after saving, and 130 for an interrupted command. Only defects end with a traceback.

        Args:
            quiet: Loggers of which only warnings are shown.
        """
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        for verbose in ("httpx", "datasets", *quiet):
            logging.getLogger(verbose).setLevel(logging.WARNING)
        if not sys.stderr.isatty():  # in a file, a bar is one line of kilobytes
            for switch in _NO_BARS:
                os.environ.setdefault(switch, "1")
        try:
            self.run(sys.argv[1:])
        except UserError as error:
            message, status = f"error: {error}", 2
        except RunStopped as stop:
            message, status = f"{stop}", stop.exit_status
        except KeyboardInterrupt:
            message, status = "interrupted; checkpoints already written are complete", 130
        else:
            return
        print(printable(f"{self.name}: {message}"), file=sys.stderr)
        sys.exit(status)
