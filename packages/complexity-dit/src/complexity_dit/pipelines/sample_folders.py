"""Folders of seeded samples, which `sample` and `evaluate` continue and never mix.

    FOLDER/settings.json     everything that determines the bits of the images
    FOLDER/000000.png        image 0, and so on

An image is valid if its checksum, a text of the PNG, matches its pixels, number and settings.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from complexity_dit.hashing import array_hash
from complexity_dit.pictures import read_picture
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, remove_partial_writes
from inl_core.run.folders import claim_folder
from inl_core.run.json_files import read_json_object

logger = logging.getLogger(__name__)

SAMPLES_KIND = "complexity-dit-samples"
SETTINGS_FILE = "settings.json"
CHECK = "complexity-dit-check"

_IMAGE = re.compile(r"\d{6,}\.png")


def key_of(settings: dict[str, Any]) -> str:
    """Hash of the settings of a set of samples."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def claim_samples(folder: Path) -> Iterator[None]:
    """Lock a folder of samples, as `claim_folder` does; version 0.1.0 marked it by its settings."""
    with claim_folder(folder, SAMPLES_KIND, is_earlier=lambda path: "num_images" in _kept(path)):
        yield


def prepare_samples(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Prepare a folder for images of these settings. One process calls it, before the others.

    Args:
        folder: A folder of samples, or an empty or new one.
        settings: Everything that determines the bits of the images, as JSON values.
        overwrite: Remove images of other settings.

    Raises:
        UserError: It has images of other settings (named) and `overwrite` is false, or other files
            and no settings.
    """
    settings = json.loads(json.dumps(settings))
    if (folder / SETTINGS_FILE).is_file():
        remove_partial_writes(folder)
        kept = _kept(folder)
        images = [path for path in folder.iterdir() if _IMAGE.fullmatch(path.name)]
        if kept == settings:
            logger.info("%s has %d images of an earlier run, checked now", folder, len(images))
            return
        differ = sorted(k for k in kept.keys() | settings.keys() if kept.get(k) != settings.get(k))
        if not overwrite:
            raise UserError(
                f"{folder} has images made with other settings ({', '.join(differ)}); choose "
                "another --out, remove it, or set overwrite"
            )
        for image in images:
            image.unlink()
    elif folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and has no {SETTINGS_FILE}; choose another --out")
    with atomic_file(folder / SETTINGS_FILE) as scratch:
        scratch.write_text(json.dumps(settings, indent=2) + "\n")


def _kept(folder: Path) -> dict[str, Any]:
    """The settings in a folder; empty if there are none or they cannot be read."""
    try:
        return read_json_object(folder / SETTINGS_FILE, follow_links=False)
    except (OSError, ValueError):
        return {}


def keep_image(folder: Path, number: int, image: NDArray[np.uint8], key: str) -> None:
    """Write an image (Y, X, 3), with its checksum for settings of this key."""
    about = PngImagePlugin.PngInfo()
    about.add_text(CHECK, _check(image, number, key))
    with atomic_file(folder / f"{number:06d}.png") as scratch:
        Image.fromarray(image).save(scratch, format="PNG", pnginfo=about)


def kept_image(folder: Path, number: int, key: str) -> NDArray[np.uint8] | None:
    """Read an image if it is complete and of the settings of this key, else None."""
    path = folder / f"{number:06d}.png"
    if not path.is_file():
        return None
    try:
        picture = read_picture(path)
        image = np.asarray(picture)
        if picture.info.get(CHECK) == _check(image, number, key):
            return image
    except UserError:
        pass
    logger.warning("%s does not match its checksum; it is generated again", path)
    return None


def _check(image: NDArray[np.uint8], number: int, key: str) -> str:
    return hashlib.sha256(f"{key} {number} {array_hash(image)}".encode()).hexdigest()
