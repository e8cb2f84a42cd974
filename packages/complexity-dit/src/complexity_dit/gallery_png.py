"""PNGs that remember how they were painted, and reading that back."""

import io
import json
import shlex
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from complexity_dit.data.sources import bombs_refused
from complexity_dit.gallery import Gallery, Settings
from complexity_dit.grids import draw_grid
from inl_core.run.errors import UserError
from inl_core.run.json_files import filled, parse_json

CHUNK = "complexity-dit"
"""Keyword of the text chunk."""

_VERSIONS = ("complexity-dit", "diffusers", "torch")


@dataclass(frozen=True)
class Remembered:
    """What a PNG of the gallery says about itself."""

    settings: Settings
    """How its picture, or all pictures of a sheet, were painted."""

    picture: int | None
    """Which picture of the grid or strip it is; None for a whole sheet."""

    pipeline_sha256: str
    """Of the networks' configs and weights."""

    versions: dict[str, str]
    """Of the packages that painted."""


def picture_png(
    gallery: Gallery, settings: Settings, image: NDArray[np.uint8], picture: int
) -> bytes:
    """One picture at its own size, uint8 (Y, X, 3), as PNG bytes with its settings."""
    return _encode(Image.fromarray(image), gallery, settings, picture)


def sheet_png(gallery: Gallery, settings: Settings, images: NDArray[np.uint8]) -> bytes:
    """All pictures, uint8 (N, Y, X, 3), on one sheet as PNG bytes with their settings."""
    columns = sheet_columns(len(images))
    captions = gallery.captions(settings) if settings.strip is not None else []
    return _encode(draw_grid(images, columns, below=captions), gallery, settings, None)


def sheet_columns(count: int) -> int:
    """Columns of a sheet that is at least as wide as it is high."""
    return next(columns for columns in range(1, count + 1) if columns * columns >= count)


def read_png(data: bytes) -> Remembered:
    """What a PNG of the gallery says about itself.

    Raises:
        UserError: It is no PNG, or not one of the gallery.
    """
    try:
        with bombs_refused(), Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            text = file.info.get(CHUNK)
    # Pillow's parsers raise almost anything on broken bytes.
    except Exception as error:
        raise UserError(f"not a PNG that can be read: {error}") from error
    if text is None:
        raise UserError(f"the PNG has no {CHUNK} text: it is not of the gallery, or was re-saved")
    try:
        told = parse_json(text)
        if not isinstance(told, dict):
            raise ValueError("it is no object")
        return filled(Remembered, told | {"settings": Settings.from_dict(told["settings"])})
    except (KeyError, ValueError) as error:
        raise UserError(f"the PNG's {CHUNK} text is not the gallery's: {error}") from error


def sample_command(gallery: Gallery, settings: Settings, pipeline: str = "PIPELINE") -> str | None:
    """The command that paints the pictures of a grid again, bit for bit; a strip has none."""
    if settings.strip is not None:
        return None
    words = ["complexity-dit", "sample", pipeline, "--out", "pictures"]
    for name, value in settings.labels.items():
        words += [f"--labels.{name}", value]
    for name in ("num_images", "seed", "num_inference_steps", "guidance_scale", "chunk_size"):
        words += [f"--{name}", f"{getattr(settings, name)}"]
    if settings.scheduler not in (None, gallery.own_scheduler):
        words += ["--scheduler", settings.scheduler]
    if settings.side not in (None, gallery.pipe.sample_size):
        words += ["--height", f"{settings.side}", "--width", f"{settings.side}"]
    return shlex.join(words)


def _encode(image: Image.Image, gallery: Gallery, settings: Settings, picture: int | None) -> bytes:
    told = {
        "settings": settings.as_dict(),
        "picture": picture,
        "pipeline_sha256": gallery.pipeline_sha256,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    about = PngImagePlugin.PngInfo()
    about.add_text(CHUNK, json.dumps(told))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=about)
    return file.getvalue()
