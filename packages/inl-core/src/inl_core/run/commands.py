"""A program as a table of commands: jsonargparse reads their options, errors become one line.

Options and their help come from dataclasses, which load nothing heavy. A command imports the code
that does its work when it runs, so that help pages stay fast.
"""

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader, set_parsing_settings

from inl_core.run.errors import RunStopped, UserError
from inl_core.run.json_files import printable, without_retired
from inl_core.run.settings import (
    check_yaml,
    dump_settings,
    nearest,
    parse_yaml,
    plain_type,
    settings_text,
)
from inl_core.run.threads import set_threads

_NO_BARS = (
    "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS",
)  # fmt: skip
"""What tqdm and the libraries around it read when they are imported."""

REQUIRED = ...
"""Default of an option that must be given."""


@dataclass(frozen=True)
class Option:
    """An option that is not a field of a dataclass, or a word without a name.

    Attributes:
        help: Its line in the help.
        default: Value if it is not given.
        kind: Type of the value.
    """

    help: str
    default: Any = REQUIRED
    kind: Any = str


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
        others: Options that another library defines, below a title of their own at the end of the
            help: {title: options}.
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
    others: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    has_config: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def kinds(self) -> dict[str, Any]:
        """The types of all options, by name."""
        found = {name: one.kind for name, one in self.options.items()} | dict(self.groups)
        for options in self.others.values():
            found |= {name: one.kind for name, one in options.items()}
        for config in self.configs:
            hints = get_type_hints(config)
            found |= {name: kind for name, kind in hints.items() if name not in self.skip}
        return found | {former: found[new] | None for former, new in self.renamed.items()}

    def parser(self) -> ArgumentParser:
        """Build a parser of the options."""
        parser = ArgumentParser(description=self.about)
        for name, option in self.arguments.items():
            parser.add_argument(name, type=option.kind, help=_escaped(option.help))
        if self.has_config:
            parser.add_argument("--config", action="config", help="a YAML file with any options")
        _add_options(parser, self.options)
        kinds = self.kinds()
        for former, present in self.renamed.items():
            help_line = f"former name of --{present}"
            parser.add_argument(f"--{former}", type=kinds[former], help=help_line)
        for config in self.configs:
            parser.add_class_arguments(config, None, skip=set(self.skip))
        for name, config in self.groups.items():
            parser.add_class_arguments(config, name)
        for title, options in self.others.items():
            _add_options(parser.add_argument_group(title), options)
        parser.set_defaults(dict(self.defaults))
        return parser

    def prepared(self, words: Sequence[str]) -> Iterator[str]:
        """The words for the parser: files of settings as their text, several words as a list.

        The parser would open whatever is named, also for a group such as `data`, where only fields
        are accepted here.
        """
        kinds, rest = self.kinds(), list(words)
        while rest:
            word = rest.pop(0)
            name, equals, text = word.removeprefix("--").partition("=")
            if not word.startswith("--"):
                yield word
            elif self.has_config and name == "config" and (equals or rest):
                path = Path(text if equals else rest.pop(0))
                values = parse_yaml(settings_text(path))
                try:
                    values = _without_retired(values, self.configs)
                except ValueError as error:
                    raise UserError(f"{path}: {error}") from None
                _check_values(values, kinds)
                yield f"--config={dump_settings(values)}"
            elif _takes_several(name, kinds):
                values = [text] if equals else []
                while not equals and rest and not rest[0].startswith("--"):
                    values.append(rest.pop(0))
                yield f"--{name}={json.dumps(values)}"
            elif is_text(kind := kind_of(name, kinds)) or not (equals or rest):
                yield word
            else:
                text = text if equals else rest.pop(0)
                try:
                    values = parse_yaml(text)
                except ValueError as error:
                    raise UserError(f"{name} is {text[:60]!r}: {error}") from None
                _check_values(values, kind, name)
                yield f"--{name}={text}"

    def __call__(self, options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Instances of `configs`, and the other options by name."""
        options = {name: value for name, value in options.items() if name != "config"}
        for former, present in self.renamed.items():
            if (value := options.pop(former)) is not None:
                options[present] = value
        configs = []
        for config in self.configs:
            names = [one.name for one in dataclasses.fields(config)]
            configs.append(config(**{name: options.pop(name) for name in names if name in options}))
        return configs, options


def _add_options(parser: Any, options: Mapping[str, Option]) -> None:
    for name, option in options.items():
        needed = option.default is REQUIRED
        default = {"required": True} if needed else {"default": option.default}
        parser.add_argument(f"--{name}", type=option.kind, help=_escaped(option.help), **default)


def group_class(kind: Any) -> type | None:
    """The dataclass of a field that is a group, or may be one; None for other fields."""
    found = [one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)]
    return found[0] if found else None  # pyright: ignore[reportReturnType]


def kind_of(name: str, kinds: Mapping[str, Any]) -> Any:
    """The type of the field, or key of a mapping, of a dotted name; None if there is none."""
    head, _, rest = name.partition(".")
    kind = kinds.get(head)
    if not rest:
        return kind
    if cls := group_class(kind):
        return kind_of(rest, get_type_hints(cls))
    mappings = [one for one in (kind, *get_args(kind)) if get_origin(one) is dict]
    return get_args(mappings[0])[1] if mappings else None


def is_text(kind: Any) -> bool:
    """Whether a field takes any text as it stands."""
    return kind is str or set(get_args(kind)) == {str, NoneType}


def field_names(kinds: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields, groups left out."""
    for name, kind in kinds.items():
        cls = group_class(kind)
        if cls is None:
            yield f"{prefix}{name}"
        else:
            yield from field_names(get_type_hints(cls), f"{prefix}{name}.")


def _without_retired(values: dict[str, Any], classes: Iterable[type]) -> dict[str, Any]:
    """Leave the `RETIRED` fields of the classes, and of their groups, out of a file's values."""
    for cls in classes:
        values = without_retired(values, getattr(cls, "RETIRED", {}))
        for name, kind in get_type_hints(cls).items():
            if (group := group_class(kind)) and isinstance(values.get(name), dict):
                values[name] = _without_retired(values[name], [group])
    return values


def _check_values(values: Any, kinds: Any, name: str = "") -> None:
    """Refuse null, and what is not fields, where the parser would take it."""
    if not isinstance(kinds, Mapping):
        cls = group_class(kinds)
        if kinds is None or NoneType in get_args(kinds) or (cls is None and values is not None):
            return
        if cls is None:
            raise UserError(f"{name} is null; expected a value")
        kinds = get_type_hints(cls)
        if not isinstance(values, dict):
            example = next(iter(kinds))
            raise UserError(
                f"{name} is {str(values)[:60]!r}; expected fields, such as {{{example}: ...}}"
            )
    for key, value in values.items():
        _check_values(value, kinds.get(key), f"{name}.{key}" if name else str(key))


def _takes_several(name: str, kinds: Mapping[str, Any]) -> bool:
    """Whether a word is a key of a mapping of lists, as in `--labels.style A B`."""
    head, _, key = name.partition(".")
    mappings = [one for one in get_args(kinds.get(head)) if get_origin(one) is dict]
    return bool(key) and any(get_origin(get_args(one)[1]) is list for one in mappings)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


_load = get_loader("yaml")


def _load_data(text: str) -> Any:
    check_yaml(text)
    return _load(text)


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
    _parsers: dict[str, ArgumentParser] = field(default_factory=dict, repr=False, compare=False)

    def parser(self, with_options: Container[str]) -> ArgumentParser:
        """Build the parser of all commands, with the options of those in `with_options`."""
        set_parsing_settings(
            docstring_parse_attribute_docstrings=True,
            add_print_completion_argument=True,
            # No value may name code. The parser looks the class of an optional group up by name.
            import_path_denylist=["*"],
            import_path_allowlist=[
                f"{cls.__module__}.{cls.__qualname__}"
                for command in self.commands.values()
                for kind in command.kinds().values()
                if (cls := group_class(kind)) is not None
            ],
            instantiate_subclass_spec_in_any=False,
        )
        set_loader("yaml", _load_data, exceptions=(yaml.YAMLError, ValueError))
        parser = ArgumentParser(prog=self.name, description=self.about, version=self.version)
        commands = parser.add_subcommands()
        for name, command in self.commands.items():
            empty = ArgumentParser(description=command.about)
            commands.add_subcommand(
                name, command.parser() if name in with_options else empty, help=command.about
            )
        for each in (parser, *commands.choices.values()):
            each.exit_on_error = False  # it raises, and `parse` words the message
        return parser

    def parse(self, words: Sequence[str]) -> tuple[str, list[Any], dict[str, Any]]:
        """Parse a command line without running it.

        Returns:
            The command, its configs, and its other options by name.

        Raises:
            UserError: Naming what is wrong, what was expected and the nearest names.
        """
        name = next((word for word in words if not word.startswith("-")), "")
        # A completion script lists every option; anything else concerns the named command only.
        complete = any(word.startswith("--print_completion") for word in words)
        key = "--print_completion" if complete else name
        if key not in self._parsers:
            self._parsers[key] = self.parser(self.commands if complete else [name])
        command = self.commands.get(name)
        try:
            first = words.index(name) + 1 if command else 0
            prepared = [*words[:first], *command.prepared(words[first:])] if command else words
            parser = self._parsers[key]
            parsed = parser.instantiate(parser.parse_args(list(prepared)))
            assert command is not None  # the parser demands one
            return name, *command(parsed[name].as_dict())
        except UserError as error:
            raise UserError(f"{error}; see {self.name} {name} --help") from None
        except ArgumentError as error:
            raise UserError(self._explain(str(error), name)) from None
        except Exception as error:  # values can make the parser raise exceptions of any type
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"the options cannot be read ({type(error).__name__}: {text})"
            ) from None

    def run(self, words: Sequence[str]) -> None:
        """Parse and run one command."""
        name, configs, options = self.parse(words)
        self.commands[name].run(*configs, **options)

    def main(self, quiet: Sequence[str] = ()) -> None:
        """Run the command of `sys.argv`; report errors in one line and set the exit status.

        The status is 2 for wrong input, 128 + the signal for a training that was stopped by a
        signal after saving, and 130 for an interrupted command. Only defects end with a traceback.

        Args:
            quiet: Loggers of which only warnings are shown.
        """
        set_threads()
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

    def _explain(self, message: str, command: str) -> str:
        """One line that names the value, what was expected and the nearest names."""
        known = ", ".join(self.commands)
        if not command:
            return f"no command: choose one of {known}"
        if command not in self.commands:
            near = nearest(command, self.commands)
            return f"unknown command {command!r}{near}; the commands are {known}"
        help_line = f"see {self.name} {command} --help"
        unknown = [name for match in _UNKNOWN.findall(message) for name in match if name]
        group = re.match(r'Parser key "([^"]+)"', message)
        if unknown and group:
            unknown = [f"{group[1]}.{name}" for name in unknown]
        if message.startswith("unrecognized arguments:"):
            words = message.partition(":")[2].split()
            unknown = [w.lstrip("-").partition("=")[0] for w in words if w.startswith("--")]
            if not unknown:
                return f"{command} takes no {' '.join(words)!r}; {help_line}"
        if unknown:
            names = list(field_names(self.commands[command].kinds()))
            parts = [f"unknown field {name!r}{nearest(name, names)}" for name in unknown]
            return f"{'; '.join(parts)}; {help_line}"
        return f"{_wrong_value(message)}; {help_line}"


_UNKNOWN = re.compile(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted")
"""How the parser reports an unknown field of a YAML, and one inside an optional group."""


def _wrong_value(message: str) -> str:
    """A message about a value of the wrong type, from the longer one of the parser."""
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    kinds = re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", message)
    if key and given and kinds:
        expected = " or ".join(dict.fromkeys(plain_type(kind) for kind in kinds))
        value = repr(given[1].strip())
        value = value if len(value) <= 60 else f"{value[:57]}..."
        return f"{key[1]} is {value}; expected {expected}"
    text = message[key.end() :] if key else message
    return (f"{key[1]}: " if key else "") + "; ".join(
        line.strip(" -:") for line in text.splitlines() if line.strip()
    )
