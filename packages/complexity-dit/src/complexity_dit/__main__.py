"""The command line: `complexity-dit demo | train | encode | sample | evaluate | ...`."""

import json
import logging
import sys
from collections.abc import Container, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from complexity_dit import __version__
from complexity_dit.cli.commands import COMMANDS
from inl_core.run.errors import RunStopped, UserError
from inl_core.run.json_files import printable, unreadable


def build_parser(filled: Container[str] = COMMANDS) -> ArgumentParser:
    """All commands, with the options of those in `filled`: each imports what it is made of."""
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
    )
    parser = ArgumentParser(prog="complexity-dit", description=__doc__, version=__version__)
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        own = ArgumentParser(description=command.about)
        if name in filled:
            command.add_options(own)
        commands.add_subcommand(name, own, help=command.about)
    for one in (parser, *commands.choices.values()):
        one.exit_on_error = False  # it raises instead, and `run` says it more plainly
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parse and run one command."""
    command, options = parse(arguments)
    COMMANDS[command].run(options)


def parse(
    arguments: Sequence[str], parser: ArgumentParser | None = None
) -> tuple[str, dict[str, Any]]:
    """The command and its options, of the types that they have; nothing is run.

    Args:
        arguments: The words after the program's name.
        parser: Of `build_parser`, to parse many times with; built by default.

    Raises:
        UserError: Naming what is wrong, what was expected and the nearest names.
    """
    # A completion script names every option; all else is about the command that is named.
    everything = any(word.startswith("--print_completion") for word in arguments)
    parser = parser or build_parser(COMMANDS if everything else arguments)
    arguments = _join_labels(arguments)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        from complexity_dit.cli.commands import explain

        commands = parser._subcommands_action
        assert commands is not None  # build_parser added them
        raise UserError(explain(str(error), arguments, commands.choices)) from None
    except UserError:
        raise
    except Exception as error:  # the parser lets through what a value makes its own code raise
        raise UserError(unreadable(error)) from error
    return parsed.subcommand, parsed[parsed.subcommand].as_dict()


def _join_labels(arguments: Sequence[str]) -> list[str]:
    """Turn `--labels.style Cubism Fauvism` into `--labels.style=["Cubism","Fauvism"]`.

    The fields of `--labels` are known only to the pipeline, so the parser cannot declare them as
    options that take several values.
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
    """Run a command and turn what ends it into a message and an exit status.

    Wrong input is 2; a training that a signal stopped after saving is 128 + the signal, as in a
    shell; an interrupted command is 130. Only defects of ours end with a traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for chatty in ("httpx", "datasets", "fsspec", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        run(sys.argv[1:])
    except UserError as error:
        sys.exit(_fail(f"complexity-dit: error: {error}", 2))
    except RunStopped as stop:
        sys.exit(_fail(f"complexity-dit: {stop}", stop.exit_status))
    except KeyboardInterrupt:
        sys.exit(_fail("complexity-dit: interrupted; checkpoints already written are whole", 130))


def _fail(message: str, status: int) -> int:
    print(printable(message), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
