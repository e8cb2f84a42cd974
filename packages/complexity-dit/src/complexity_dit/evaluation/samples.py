"""Samples of a pipeline as a set of images, generated when they are read, kept and reused.

Kept images are PNG files in a folder with a ``settings.json``. An interrupted evaluation reuses
them: a file is valid if its checksum matches its pixels, its number and the settings.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor

from complexity_dit.config import SampleConfig
from complexity_dit.distributed import on_main
from complexity_dit.evaluation.features import FEATURE_CHUNK
from complexity_dit.evaluation.image_sets import ImageSet
from complexity_dit.hashing import array_hash, module_hash
from complexity_dit.pictures import read_picture
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import (
    iter_samples,
    load_guide,
    pipeline_hash,
    scheduler_settings,
)
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, remove_partial_writes
from inl_core.run.json_files import read_json_object

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
CHECK = "complexity-dit-check"


def generated_images(
    pipe: ComplexityDiTPipeline,
    labels: Tensor,
    config: SampleConfig,
    folder: Path | None = None,
    overwrite: bool = False,
    asked: dict[str, NDArray[np.int64]] | None = None,
    label_names: dict[str, list[str]] | None = None,
) -> ImageSet:
    """Seeded samples of a pipeline.

    Args:
        pipe: The pipeline.
        labels: Label ids, (n, F) int64, -1 for not given.
        config: Seed, sampler and batch.
        folder: Folder that keeps the images; with None, an image read twice is generated twice.
        overwrite: Remove images of other settings from the folder.
        asked: Field -> requested ids (n,) in the numbering of the reference.
        label_names: Field -> names of those ids.

    Returns:
        An `ImageSet` of n images; its fingerprint is a hash of the settings and the weights.

    Raises:
        UserError: The folder has images of other settings (named), and ``overwrite`` is false.
    """
    settings = _settings(pipe, labels, config)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if folder is not None:
        on_main(lambda: _open(folder, settings, overwrite))

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        images: dict[int, NDArray[np.uint8]] = {}
        if folder is not None:
            for number in numbers:
                image = _read_kept(folder / f"{number:06d}.png", number, key)
                if image is not None:
                    images[number] = image
        missing = sorted(set(numbers) - set(images))
        for indices, batch in iter_samples(pipe, labels, config, missing, progress=False):
            for number, image in zip(indices, batch, strict=True):
                images[number] = image
                if folder is not None:
                    _keep(folder / f"{number:06d}.png", image, number, key)
        return np.stack([images[number] for number in numbers])

    unit = math.lcm(config.chunk_size, FEATURE_CHUNK)
    asked, names = asked or {}, label_names or {}
    return ImageSet(
        name="samples",
        fingerprint=key,
        count=len(labels),
        size=(config.height or pipe.sample_size, config.width or pipe.sample_size),
        read=read,
        labels=np.stack([*asked.values()], 1) if asked else np.empty((len(labels), 0), np.int64),
        label_names={field: names[field] for field in asked},
        # Full chunks of the pipeline and of the feature network, at least one batch.
        block=unit * math.ceil(config.batch_size / unit),
    )


def _settings(pipe: ComplexityDiTPipeline, labels: Tensor, config: SampleConfig) -> dict[str, Any]:
    """Everything that determines the bits of the images."""
    sample, guide = asdict(config), {}
    sample.pop("batch_size")
    if config.autoguidance is not None:
        guide["autoguidance_sha256"] = module_hash(load_guide(config.autoguidance, pipe))
    return {
        "pipeline_sha256": pipeline_hash(pipe),
        **guide,
        **scheduler_settings(pipe, config),
        "labels_sha256": array_hash(labels.numpy()),
        "num_images": len(labels),
        "device": pipe.device.type,
        "dtype": str(pipe.transformer.dtype),
        **{f"sample.{name}": value for name, value in sample.items()},
    }


def _open(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Prepare the folder for these settings, or raise if it has images of others."""
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS_FILE
    if path.is_file():
        remove_partial_writes(folder)  # of a run that was killed while writing
        try:
            kept = read_json_object(path)
        except ValueError:
            kept = {}
        if kept == settings:
            count = sum(1 for _ in folder.glob("*.png"))
            logger.info("%s has %d images of an earlier run, which are checked", folder, count)
            return
        differ = sorted(k for k in kept.keys() | settings.keys() if kept.get(k) != settings.get(k))
        if not overwrite:
            raise UserError(
                f"{folder} has images made with other settings ({', '.join(differ)}); choose "
                "another --out, remove it, or set overwrite"
            )
        for image in folder.glob("[0-9]*.png"):
            image.unlink()
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and has no {SETTINGS_FILE}; choose another --out")
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(settings, indent=2) + "\n")


def _check(image: NDArray[np.uint8], number: int, key: str) -> str:
    return hashlib.sha256(f"{key} {number} {array_hash(image)}".encode()).hexdigest()


def _keep(path: Path, image: NDArray[np.uint8], number: int, key: str) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text(CHECK, _check(image, number, key))
    with atomic_file(path) as scratch:
        Image.fromarray(image).save(scratch, format="PNG", pnginfo=about)


def _read_kept(path: Path, number: int, key: str) -> NDArray[np.uint8] | None:
    """A kept image if it is complete and of these settings, else None."""
    if not path.is_file():
        return None
    try:
        picture = read_picture(path)
        image, check = np.asarray(picture), picture.info.get(CHECK)
    except UserError:
        image, check = None, None
    if image is not None and check == _check(image, number, key):
        return image
    logger.warning("%s does not match its checksum; it is generated again", path)
    return None
