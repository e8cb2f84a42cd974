"""What an evaluation can compare: folders of images, splits of a data source, kept statistics."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from complexity_dit.errors import UserError
from complexity_dit.metrics import Statistics

if TYPE_CHECKING:
    from complexity_dit.data import PaintingDataset

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class ImageSet:
    """Images that can be read by number.

    Attributes:
        name: For progress bars.
        fingerprint: Hash of what the images are.
        count: How many there are.
        size: Height and width in pixels.
        read: Numbers -> uint8 (n, H, W, 3).
        labels: (count, F) class ids, -1 where missing; F is 0 without labels.
        label_names: Field -> names in the order of their ids; fields in column order.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int]
    read: Callable[[Sequence[int]], NDArray[np.uint8]]
    labels: NDArray[np.int64]
    label_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def column(self, field: str) -> NDArray[np.int64]:
        """The ids (count,) of one label field."""
        return self.labels[:, list(self.label_names).index(field)]


def is_source(text: str) -> bool:
    """Whether a reference is a data source (``art``, ``imagefolder:PATH``, ``hub:NAME``)."""
    return text == "art" or text.startswith(("imagefolder:", "hub:"))


def folder_images(folder: Path) -> ImageSet:
    """The images of a folder and its sub-folders, in the order of their relative paths.

    Args:
        folder: Where PNG, JPEG, WebP or BMP files of one size are.

    Returns:
        Their `ImageSet`; the fingerprint is a sha256 over relative paths and bytes.

    Raises:
        UserError: No such folder, or fewer than 2 images. Reading raises it too, naming the file:
            another size, a broken file, a mode other than 8-bit RGB or grey.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; expected a folder of images, a statistics .npz, or one of "
            "art, imagefolder:PATH, hub:NAME"
        )
    paths = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()),
        key=lambda p: p.relative_to(folder).as_posix(),
    )
    if len(paths) < 2:
        raise UserError(
            f"{folder} holds {len(paths)} images ({', '.join(sorted(IMAGE_SUFFIXES))}); a distance "
            "needs at least 2"
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    height, width = _read_image(paths[0]).shape[:2]

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        images = []
        for number in numbers:
            image = _read_image(paths[number])
            if image.shape[:2] != (height, width):
                raise UserError(
                    f"{paths[number]} is {image.shape[1]}x{image.shape[0]} and {paths[0].name} is "
                    f"{width}x{height}; make all images one size"
                )
            images.append(image)
        return np.stack(images)

    nothing = np.empty((len(paths), 0), np.int64)
    return ImageSet(folder.name, digest.hexdigest(), len(paths), (height, width), read, nothing)


def dataset_images(dataset: "PaintingDataset", name: str) -> ImageSet:
    """A split of a data source with its labels."""

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        return dataset.pixels(numbers).permute(0, 2, 3, 1).contiguous().numpy()

    side = dataset.resolution
    return ImageSet(
        *(name, dataset.fingerprint, len(dataset), (side, side), read),
        labels=dataset.labels.numpy(),
        label_names=dataset.label_names,
    )


def read_statistics(path: Path) -> Statistics:
    """Kept statistics: an ``.npz`` with ``mu`` (D,), ``sigma`` (D, D) and ``n``.

    Raises:
        UserError: No such file, or arrays that are missing or do not fit.
    """
    try:
        # Opened here because np.load leaks the handle of a broken zip.
        with path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            arrays = dict(file) if isinstance(file, NpzFile) else {}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as statistics ({error})") from error
    missing = sorted({"mu", "sigma", "n"} - set(arrays))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; expected mu, sigma and n")
    mu, sigma, n = (arrays[key] for key in ("mu", "sigma", "n"))
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or n.size != 1:
        raise UserError(
            f"{path} holds mu {mu.shape}, sigma {sigma.shape}, n {n.shape}; expected (D,), (D, D) "
            "and one number"
        )
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), int(n.item()))


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(
                    f"{path} has the mode {image.mode}; expected 8-bit RGB or grey: convert it"
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove or replace it") from error
