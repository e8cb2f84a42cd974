"""Trained models that a clone of the repository has in `checkpoints/`, known by their names."""

from collections.abc import Mapping
from pathlib import Path

FOLDER = "checkpoints"
"""Folder of the trained models, in the root of the repository."""


def shipped(name: str, hub_ids: Mapping[str, str]) -> str:
    """What the name of a trained model means; a path of that name wins over it.

    It is looked for in the working directory and in the clone that this package is installed from
    (`pip install -e`).

    Args:
        name: What the user wrote in the place of a model.
        hub_ids: The trained models, by name.

    Returns:
        The folder of the model, or its Hub id where there is none; any other name as it is.
    """
    if name not in hub_ids or Path(name).exists():
        return name
    roots = (Path.cwd(), *Path(__file__).resolve().parents[5:6])
    folders = [root / FOLDER / name for root in roots]
    return next((str(folder) for folder in folders if folder.is_dir()), hub_ids[name])
