"""The Hugging Face hub: reach it quickly or say in one line that it cannot be reached."""

import os
import urllib.error
import urllib.request

from datasets import config as datasets_config
from huggingface_hub import constants

from inl_core.run.errors import UserError

_TIMEOUT_S = 4.0


def require_hub(name: str, hint: str) -> None:
    """Ask the hub for its front page, so that no network means one line and not 23 s of retries.

    Offline by choice (``HF_HUB_OFFLINE=1``) is fine: what is cached can be read.

    Args:
        name: What was asked for, as the user wrote it.
        hint: What to do without the hub; a clause of the message.

    Raises:
        UserError: The hub does not answer.
    """
    if is_offline():
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        said: object = error
        if error.code < 500:
            return
    except OSError as error:
        said = getattr(error, "reason", error)
    raise UserError(
        f"{name}: cannot reach {constants.ENDPOINT} ({said}); {hint}, or set HF_HUB_OFFLINE=1 "
        "if this machine has already cached it"
    )


def is_offline() -> bool:
    """Whether the user has switched the hub off."""
    return bool(constants.HF_HUB_OFFLINE or datasets_config.HF_HUB_OFFLINE)


def is_local(name: str) -> bool:
    """Whether a name that could be a hub id is a folder of this machine, or is written as one."""
    return os.path.isdir(name) or name.startswith((".", "/", "~"))


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause: hub errors wrap each other in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
