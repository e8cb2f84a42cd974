"""The command line: `complexity-dit demo | train | encode | sample | evaluate | ...`."""

import json
import logging
import sys
from collections.abc import Container, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from complexity_dit import __version__
from complexity_dit.cli.commands import COMMANDS, explain
from inl_core.run.errors import RunStopped, UserError
from inl_core.run.json_files import describe_settings_error, printable


def build_parser(with_options: Container[str] = COMMANDS) -> ArgumentParser:
    """Build the parser of all commands, with the options of those in `with_options`."""
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
    )
    parser = ArgumentParser(prog="complexity-dit", description=__doc__, version=__version__)
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        empty = ArgumentParser(description=command.about)
        commands.add_subcommand(
            name, command.parser() if name in with_options else empty, help=command.about
        )
    for each in (parser, *commands.choices.values()):
        each.exit_on_error = False  # it raises, and `parse` words the message
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parse and run one command."""
    command, options = parse(arguments)
    COMMANDS[command](options)


def parse(
    arguments: Sequence[str], parser: ArgumentParser | None = None
) -> tuple[str, dict[str, Any]]:
    """Parse a command line without running it.

    Args:
        arguments: The words after the program's name.
        parser: Result of `build_parser`, to parse several times with; built by default.

    Returns:
        The command and its options, converted to their types.

    Raises:
        UserError: Naming what is wrong, what was expected and the nearest names.
    """
    # A completion script lists every option; anything else concerns the named command only.
    complete = any(word.startswith("--print_completion") for word in arguments)
    parser = parser or build_parser(COMMANDS if complete else arguments)
    arguments = _join_labels(arguments)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        commands = parser._subcommands_action
        assert commands is not None  # build_parser added them
        raise UserError(explain(str(error), arguments, commands.choices)) from None
    except UserError:
        raise
    except Exception as error:  # values can make the parser raise exceptions of any type
        raise UserError(describe_settings_error(error)) from error
    return parsed.subcommand, parsed[parsed.subcommand].as_dict()


def _join_labels(arguments: Sequence[str]) -> list[str]:
    """Turn `--labels.style Cubism Fauvism` into `--labels.style=["Cubism","Fauvism"]`.

    Only the pipeline knows the fields of `--labels`, so the parser cannot declare them as options
    that take several values.
    """
    joined: list[str] = []
    i = 0
    while i < len(arguments):
        name, equals, value = arguments[i].partition("=")
        i += 1
        if not name.startswith("--labels."):
            joined.append(arguments[i - 1])
            continue
        values = [value] if equals else []
        while not equals and i < len(arguments) and not arguments[i].startswith("--"):
            values.append(arguments[i])
            i += 1
        joined.append(f"{name}={json.dumps(values)}")
    return joined


def main() -> None:
    """Run a command; report errors in one line and set the exit status.

    The status is 2 for wrong input, 128 + the signal for a training that was stopped by a signal
    after saving, and 130 for an interrupted command. Only defects of this package end with a
    traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for verbose in ("httpx", "datasets", "fsspec", "PIL"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    try:
        run(sys.argv[1:])
    except UserError as error:
        message, status = f"error: {error}", 2
    except RunStopped as stop:
        message, status = f"{stop}", stop.exit_status
    except KeyboardInterrupt:
        message, status = "interrupted; checkpoints already written are complete", 130
    else:
        return
    print(printable(f"complexity-dit: {message}"), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
