"""The one exception that means "the input is wrong", so the command line can print it plainly."""


class UserError(ValueError):
    """Bad input, bad data or a run that cannot go on; the message says what to do.

    The command line prints the message without a traceback and exits with status 2. Anything
    else that escapes is a defect of ours and keeps its traceback.
    """
