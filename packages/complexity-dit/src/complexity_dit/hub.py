"""The Hugging Face Hub: whether it can be reached, and uploads of a folder."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from inl_core.run.errors import UserError

_HUB_TIMEOUT_S = 4.0
_SOURCE_HINT = "download it elsewhere and use source=imagefolder:PATH"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def reach_hub(what: str, hint: str = _SOURCE_HINT) -> None:
    """Ask the hub for its front page, so that no network means one line and not 23 s of retries.

    Args:
        what: What is wanted of it, to start the message with.
        hint: What to do without it.

    Raises:
        UserError: If the hub does not answer.
    """
    if constants.HF_HUB_OFFLINE or _is_on("HF_DATASETS_OFFLINE"):
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        said: Any = error
        if error.code < 500:
            return
    except OSError as error:
        said = getattr(error, "reason", error)
    raise UserError(
        f"{what}: cannot reach {constants.ENDPOINT} ({said}); {hint}, or set "
        "HF_HUB_OFFLINE=1 if this machine has already cached it"
    )


_UPLOAD_HINT = "save_pretrained(FOLDER) works without, and `hf upload REPO FOLDER` sends it later"


def check_reachable(repo_id: str) -> None:
    """Raise at once where an upload would only fail after many tries.

    Raises:
        UserError: If the Hub is switched off or does not answer.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot upload {repo_id}: HF_HUB_OFFLINE is set; {_UPLOAD_HINT}")
    reach_hub(f"upload {repo_id}", _UPLOAD_HINT)


def upload(
    folder: Path,
    message: str,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Create the repository if need be, and upload a folder.

    Args:
        folder: What to upload.
        message: The commit's, unless `commit_message` is given.
        repo_id: The folder's name by default.
        private: Whether a new repository is.
        token: Of the Hub; the one that is logged in by default.
        commit_message: The commit's.
        create_pr: Propose the upload instead.

    Returns:
        Where it is.

    Raises:
        UserError: If the Hub is out of reach, refuses, or nobody is logged in.
    """
    repo_id = repo_id or folder.name
    check_reachable(repo_id)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or message,
                create_pr=create_pr,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"cannot upload {repo_id}: {said}; {_UPLOAD_HINT}") from error
