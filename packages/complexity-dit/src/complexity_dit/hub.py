"""The Hugging Face Hub: whether it answers, and uploads of a folder."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from inl_core.run.errors import UserError
from inl_core.run.hub import is_offline, unreachable

_SOURCE_HINT = "download it elsewhere and use source=imagefolder:PATH"
_UPLOAD_HINT = "save_pretrained(FOLDER) works offline, and `hf upload REPO FOLDER` uploads it later"


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


def check_reachable(repo_id: str) -> None:
    """Raise a `UserError` if an upload cannot work because the Hub is off or does not answer."""
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
