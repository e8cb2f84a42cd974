"""The two exceptions that the command line prints plainly, without a traceback."""

import signal


class UserError(ValueError):
    """Bad input, bad data or a run that cannot go on; the message says what to do.

    The command line prints the message without a traceback and exits with status 2. Anything
    else that escapes is a defect of ours and keeps its traceback.
    """


class RunStopped(Exception):
    """A training that SIGTERM or SIGINT ended, after it had saved a checkpoint.

    The command line prints the message and exits with status 128 + the signal's number, as a shell
    reports it: 143 for SIGTERM, 130 for SIGINT.

    Args:
        number: The signal's number.
        done: What was reached and saved.
    """

    def __init__(self, number: int, done: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {done}")
        self.exit_status = 128 + number
