"""The command line: `complexity-dit demo | train | encode | sample | evaluate | ...`."""

from complexity_dit import __version__
from complexity_dit.cli.commands import COMMANDS
from inl_core.run.commands import Program

PROGRAM = Program("complexity-dit", __doc__ or "", __version__, COMMANDS)
run = PROGRAM.run


def main() -> None:
    """Run the command of the shell; see `Program.main`."""
    PROGRAM.main(quiet=["fsspec", "PIL"])


if __name__ == "__main__":
    main()
