"""The Hugging Face Hub: whether it answers, downloads of weights, uploads of a folder.

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
_UPLOAD_HINT = "save_pretrained(FOLDER) works offline, and `hf upload REPO FOLDER` uploads it later"


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


def check_reachable(repo_id: str) -> None:
    """Raise a `UserError` if an upload cannot work because the Hub is off or does not answer."""
    from huggingface_hub import constants

    off = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable()
    if off is not None:
        raise UserError(f"cannot upload {repo_id}: {off}; {_UPLOAD_HINT}")


def check_login(repo_id: str) -> None:
    """Raise a `UserError` if an upload cannot work: the Hub is off or nobody is logged in."""
    check_reachable(repo_id)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot upload {repo_id}: {reason}; log in with `hf auth login`"
        ) from error


def upload(
    folder: Path,
    message: str,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder, to a new repository if there is none of that name.

    Args:
        folder: The folder.
        message: Default of `commit_message`.
        repo_id: "user/name" or a name of your own; by default the folder's name.
        private: Whether a new repository is private.
        token: Access token; by default the one that is logged in.
        commit_message: Message of the commit.
        create_pr: Open a pull request instead of committing.

    Returns:
        URL of the upload.

    Raises:
        UserError: If the Hub does not answer or refuses, or nobody is logged in.
    """
    repo_id = repo_id or folder.name
    check_reachable(repo_id)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        url = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message or message,
            create_pr=create_pr,
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot upload {repo_id}: {reason}; {_UPLOAD_HINT}") from error
    return str(url)
