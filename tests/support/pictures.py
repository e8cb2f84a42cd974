"""Pictures to evaluate, and folders of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(n: int, seed: int, size: int = 20) -> np.ndarray:
    """Smooth random colours, so that sets of other seeds differ in more than noise."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (n, 1, 1, 3)) + 10 * seed
    return (base + rng.integers(0, 40, (n, size, size, 3))).clip(0, 255).astype(np.uint8)


def noise(n: int, size: int) -> np.ndarray:
    """The same `n` pictures of independent pixels at every call."""
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """The images as PNG files `0000.png`, … of a new folder, which is returned."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def random_image(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """An RGB image of independent random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
