"""The Hugging Face Hub: whether it answers, and downloads of weights.

Whether it answers is asked once, before its client retries for 23 seconds.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inl_core.run.errors import UserError

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


def download_weights(repo_id: str, options: dict[str, Any], texts: Sequence[str] = ()) -> Path:
    """Download the configs and safetensors of a network, and nothing else, into the cache.

    Args:
        repo_id: The repository.
        options: Those of `from_pretrained`, of which `subfolder`, `variant`, `revision`, `token`,
            `cache_dir`, `force_download` and `local_files_only` are used.
        texts: Patterns of further files, e.g. those of a tokenizer.

    Returns:
        The folder of this version in the cache, without the `subfolder`.

    Raises:
        UserError: If the repository does not exist or cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    subfolder, variant = (options.get(name) for name in ("subfolder", "variant"))
    start = f"{subfolder}/" if subfolder else ""
    ending = f".{variant}" if variant else ""
    weights = [
        f"{start}{stem}{ending}{part}.safetensors"
        for stem in ("model", "diffusion_pytorch_model")
        for part in ("", "-*-of-*")
    ]
    patterns = [f"{start}*.json", *weights, *texts]
    names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    given = {name: options[name] for name in names if options.get(name) is not None}
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **given))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {repo_id}, no folder here, from the Hub: {reason}") from error
