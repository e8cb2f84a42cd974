"""The two exceptions that the command line prints as a message, without a traceback."""

import signal


class UserError(ValueError):
    """Bad input, bad data, or a run that cannot continue; the message says what to do.

    The command line prints the message and exits with status 2. Any other exception is a bug and
    keeps its traceback.
    """


class RunStopped(Exception):
    """A training ended by SIGTERM or SIGINT, after it saved a checkpoint.

    The command line prints the message and exits with status 128 + `number`, as a shell reports
    it: 143 for SIGTERM, 130 for SIGINT.

    Args:
        number: Number of the signal.
        done: What was reached and saved, to complete the message.
    """

    def __init__(self, number: int, done: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {done}")
        self.exit_status = 128 + number
