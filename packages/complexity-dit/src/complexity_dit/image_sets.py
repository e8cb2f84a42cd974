"""Sets of images an evaluation can compare: folders, .npz files, splits of a data source."""

import hashlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from complexity_dit.data.sources import bombs_refused
from complexity_dit.statistics_files import read_arrays
from inl_core.run.errors import UserError

if TYPE_CHECKING:
    from complexity_dit.data.dataset import PaintingDataset

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
_MODES = {
    "RGBA": "alpha",
    "LA": "grey with alpha",
    "PA": "palette with alpha",
    "P": "palette",
    "I;16": "16-bit grey",
    "I": "32-bit grey",
    "F": "floating point",
    "1": "black and white",
    "CMYK": "print colours",
    "YCbCr": "video colours",
}


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
        block: How many are best read together.
        lasting: Whether the images are a data source's, so that features are worth keeping.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int]
    read: Callable[[Sequence[int]], NDArray[np.uint8]]
    labels: NDArray[np.int64]
    label_names: dict[str, list[str]] = field(default_factory=dict)
    block: int = 32
    lasting: bool = False

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
        folder: Where image files of one size are, PNG preferably.

    Returns:
        Their `ImageSet`; the fingerprint is a sha256 over relative paths and bytes.

    Raises:
        UserError: No such folder, or fewer than 2 images. Reading raises it too, naming the file:
            another size, a broken file, an animation, a mode other than 8-bit RGB or grey.
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
        lasting=True,
    )


def array_images(images: NDArray[np.uint8], name: str = "images") -> ImageSet:
    """An array of images, uint8 (n, H, W, 3), as a set.

    Raises:
        UserError: Another dtype or shape, or fewer than 2 images.
    """
    _require_images(images, name)
    return _array_set(images, name, hashlib.sha256(images.tobytes()).hexdigest())


def npz_images(path: Path) -> ImageSet | None:
    """The images of an ADM-style ``.npz``: ``arr_0``, uint8 (N, H, W, 3).

    An array stored uncompressed, as ``numpy.savez`` does, stays on disk and is read by number.

    Returns:
        Their `ImageSet`, or None when the file holds no ``arr_0`` (it may hold statistics).

    Raises:
        UserError: No such file, or ``arr_0`` is something else (floats name their values that are
            not finite), or fewer than 2 images.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    stored = _stored_array(path, "arr_0.npy")
    if stored is None:
        stored = read_arrays(path, ("arr_0",)).get("arr_0")
    if stored is None:
        return None
    _require_images(stored, f"arr_0 of {path}")
    with path.open("rb") as file:
        return _array_set(stored, path.name, hashlib.file_digest(file, "sha256").hexdigest())


def _array_set(images: NDArray[np.uint8], name: str, fingerprint: str) -> ImageSet:
    return ImageSet(
        *(name, fingerprint, len(images), images.shape[1:3]),
        read=lambda numbers: np.ascontiguousarray(images[list(numbers)]),
        labels=np.empty((len(images), 0), np.int64),
    )


def _require_images(array: NDArray[Any], name: str) -> None:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        broken = ""
        if np.issubdtype(array.dtype, np.floating) and array.size and array.ndim:
            lost = int((~np.isfinite(array)).reshape(len(array), -1).any(1).sum())
            broken = (
                f", {lost} image{'s' * (lost > 1)} with values that are not finite" if lost else ""
            )
        raise UserError(
            f"{name} is {array.dtype} of shape {array.shape}{broken}; expected images as uint8 "
            "(n, H, W, 3), made by (x * 255).round().clip(0, 255)"
        )
    if len(array) < 2:
        raise UserError(f"{name} holds {len(array)} images; a distance needs at least 2")
    if 0 in array.shape:
        raise UserError(f"{name} holds pictures without a pixel, of shape {array.shape[1:3]}")


def _stored_array(path: Path, name: str) -> NDArray[Any] | None:
    """A member of a zip that is stored uncompressed, mapped from disk; None for any other."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            found = archive.getinfo(name)
            if found.compress_type != zipfile.ZIP_STORED:
                return None
            # 30 bytes of local header end with the lengths of the name and of an extra field,
            # which come next; then the member's bytes as they are.
            file.seek(found.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(found.header_offset + 30 + name_length + extra_length)
            is_first = np.lib.format.read_magic(file) == (1, 0)
            header = np.lib.format
            read = header.read_array_header_1_0 if is_first else header.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if fortran or dtype.hasobject:
                return None
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except Exception:
        # zipfile and numpy raise almost anything here; the plain reader says what is wrong.
        return None


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with bombs_refused(), Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise UserError(
                    f"{path} is an animation of {image.n_frames} frames; give one image a file"
                )
            if image.mode not in ("RGB", "L"):
                raise UserError(
                    f"{path} has the mode {image.mode} ({_MODES.get(image.mode, 'other')}); "
                    "expected 8-bit RGB or grey: convert it, as the distance depends on how"
                )
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    # Pillow's parsers raise almost anything on broken bytes.
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}); remove or replace it") from error
