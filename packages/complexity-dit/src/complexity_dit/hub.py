"""The Hugging Face Hub: whether it answers."""

from inl_core.run.errors import UserError
from inl_core.run.hub import is_offline, unreachable

_SOURCE_HINT = "download it elsewhere and use source=imagefolder:PATH"


def reach_hub(action: str, hint: str = _SOURCE_HINT) -> None:
    """Check that the Hub answers, since its client retries for 23 s; offline mode passes.

    Args:
        action: What needs the Hub; the start of the message.
        hint: What to do without the Hub.

    Raises:
        UserError: If the Hub does not answer, or answers with a server error.
    """
    if not is_offline() and (problem := unreachable()) is not None:
        raise UserError(
            f"{action}: {problem}; {hint}, or set HF_HUB_OFFLINE=1 if this machine has already "
            "cached it"
        )
