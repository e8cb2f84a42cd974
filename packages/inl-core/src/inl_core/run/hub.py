"""Whether the Hugging Face Hub answers, asked once before its client retries for 23 seconds."""

import os
import urllib.error
import urllib.request

_TIMEOUT_SECONDS = 4.0


def is_offline() -> bool:
    """Whether the user has switched the Hub off."""
    from huggingface_hub import constants  # of the packages that use it; this one needs only torch

    datasets_offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper()
    return bool(constants.HF_HUB_OFFLINE) or datasets_offline in constants.ENV_VARS_TRUE_VALUES


def unreachable() -> str | None:
    """Why the Hub cannot be reached: "cannot reach ADDRESS (REASON)"; None if it answers."""
    from huggingface_hub import constants

    reason: object = None
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        reason = error if error.code >= 500 else None
    except OSError as error:
        reason = getattr(error, "reason", error)
    return None if reason is None else f"cannot reach {constants.ENDPOINT} ({reason})"
