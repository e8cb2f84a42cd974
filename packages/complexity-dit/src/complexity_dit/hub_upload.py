"""Upload of a folder to the Hub: one clear line when that cannot be."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from complexity_dit.sources import reach_hub
from inl_core.run.errors import UserError

_WAY_OUT = "save_pretrained(FOLDER) works without, and `hf upload REPO FOLDER` sends it later"


def check_reachable(repo_id: str) -> None:
    """Raise at once where an upload would only fail after many tries.

    Raises:
        UserError: If the Hub is switched off or does not answer.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot upload {repo_id}: HF_HUB_OFFLINE is set; {_WAY_OUT}")
    reach_hub(f"upload {repo_id}", _WAY_OUT)


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
        raise UserError(f"cannot upload {repo_id}: {said}; {_WAY_OUT}") from error
