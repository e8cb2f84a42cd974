"""What a seeded set starts from in place of noise alone: pictures, or a way between two images.

`iter_samples` asks a start for the arguments of each of its calls. Image i depends on its number
alone, so that its bits are those of any other batch.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from complexity_dit.hashing import array_hash
from complexity_dit.pictures import SUFFIXES, read_picture
from complexity_dit.pipelines.image_to_image import (
    ComplexityDiTImg2ImgPipeline,
    ComplexityDiTInpaintPipeline,
    between,
)
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.saving import SETTINGS
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError


class Start(Protocol):
    """What a set starts from.

    Attributes:
        pipeline: The class of the pipeline that makes it.
        settings: What determines the bits of the images in addition to the settings of the set.
    """

    pipeline: type[ComplexityDiTPipeline]
    settings: dict[str, Any]

    def arguments(self, pipe: ComplexityDiTPipeline, batch: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline for images of these numbers, in addition to the sampler's."""
        ...


def built_as(cls: type[ComplexityDiTPipeline], pipe: ComplexityDiTPipeline) -> Any:
    """The networks and the scheduler of a pipeline in one of another class."""
    return cls(**pipe.components, **{name: pipe.config[name] for name in SETTINGS})


def pictures_in(path: Path) -> list[Path]:
    """A picture, or those of a folder in the order of their names, without its sub-folders.

    Raises:
        UserError: There is none.
    """
    if path.is_file():
        return [path]
    files = sorted(path.iterdir()) if path.is_dir() else []
    found = [file for file in files if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    if not found:
        raise UserError(f"--image {path} is neither a picture nor a folder with one in it")
    return found


class FromPictures:
    """Image-to-image of files or, with a mask, inpainting.

    Each picture is read as in training: upright RGB of which the largest centred part of the wanted
    shape is scaled, and the mask, of the same size, with it.

    Args:
        files: Image i starts from file `i // repeats`, and again from the first after the last.
        labels: Label ids, (N, F), as `iter_samples` takes them.
        size: Height and width in pixels.
        mask: White is made anew, black is kept; None for image-to-image.
        strength: Share of the steps to run, from 0 to 1.
        repeats: Images of a file that follow each other.

    Raises:
        UserError: A file cannot be read, or the mask has another size than a picture.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Tensor,
        size: tuple[int, int],
        mask: Path | None,
        strength: float,
        repeats: int,
    ) -> None:
        self.files, self.labels, self.size = files, labels, size
        self.repeats, self.strength = repeats, strength
        self.pipeline: type[ComplexityDiTPipeline] = (
            ComplexityDiTInpaintPipeline if mask else ComplexityDiTImg2ImgPipeline
        )
        whole = _read(mask, "--mask") if mask else None
        self.mask = whole and self._fitted(whole)
        digest = hashlib.sha256()
        for file in files:  # all of them now: a set does not end at a file that cannot be read
            picture = _read(file, "--image")
            if whole and whole.size != picture.size:
                raise UserError(
                    f"--mask {mask} is {whole.width}x{whole.height} and {file} is "
                    f"{picture.width}x{picture.height}: make them one size"
                )
            digest.update(_hash(self._fitted(picture)))
        self.settings: dict[str, Any] = {
            "images_sha256": digest.hexdigest(),
            "mask_sha256": self.mask and _hash(self.mask).decode(),
            "strength": strength,
            "repeats": repeats,
        }

    def _fitted(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)

    def arguments(self, pipe: ComplexityDiTPipeline, batch: Sequence[int]) -> dict[str, Any]:
        files = [self.files[i // self.repeats % len(self.files)] for i in batch]
        return {
            "class_labels": self.labels[batch],
            "image": [self._fitted(_read(file, "--image")) for file in files],
            "strength": self.strength,
            **({"mask_image": self.mask} if self.mask else {}),
        }


class Between:
    """A strip from one image to another: labels are blended linearly, noise along a sphere.

    Args:
        labels: Label ids of the first and of the last image, (2, F).
        seeds: Seeds of the noise of the first and of the last image, that of image 0 of their sets.
        count: Images in the strip, both ends included.
        size: Height and width in pixels.

    Raises:
        UserError: There are fewer than 2 images, or both ends are the same.
    """

    pipeline: type[ComplexityDiTPipeline] = ComplexityDiTPipeline

    def __init__(
        self, labels: Tensor, seeds: tuple[int, int], count: int, size: tuple[int, int]
    ) -> None:
        if count < 2:
            raise UserError(f"num_images {count} must be at least 2: both ends of the strip")
        if labels[0].equal(labels[1]) and seeds[0] == seeds[1]:
            raise UserError(
                "both ends of the strip are the same image: name two labels of a field "
                "(--labels.style Cubism Fauvism), or another seed for the last one (--to_seed 1)"
            )
        self.labels, self.seeds, self.count, self.size = labels, seeds, count, size
        self.settings: dict[str, Any] = {"between": labels.tolist(), "to_seed": seeds[1]}

    def arguments(self, pipe: ComplexityDiTPipeline, batch: Sequence[int]) -> dict[str, Any]:
        noises = [
            pipe._noise(1, *self.size, generator_for(seed, "sample", 0), None)
            for seed in self.seeds
        ]
        shares = [i / (self.count - 1) for i in batch]
        return between(pipe, self.labels.split(1), noises, shares)


def _read(path: Path, option: str) -> Image.Image:
    try:
        return read_picture(path)
    except UserError as error:
        raise UserError(f"{option} {path} {error}") from error


def _hash(picture: Image.Image) -> bytes:
    return array_hash(np.asarray(picture)).encode()
