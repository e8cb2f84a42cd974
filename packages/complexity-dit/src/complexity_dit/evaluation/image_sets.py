"""Sets of images an evaluation can compare: folders, .npz files, splits of a data source."""

import hashlib
import logging
import struct
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from complexity_dit.config import ADAPTER_FILE, DATA_FILE
from complexity_dit.data.pictures import bombs_refused
from complexity_dit.distributed import main_first
from complexity_dit.evaluation.distances import Float64, Statistics
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file
from inl_core.run.json_files import filled, read_json_object

if TYPE_CHECKING:
    from complexity_dit.config import DataConfig
    from complexity_dit.data.dataset import PaintingDataset
    from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline


# Kept statistics (mu, sigma, n) as .npz: ours, which say what they were made with, and others'.

UNPACKED_LIMIT = 4 * 2**30
"""Bytes of arrays that one file may unpack to; a small file may claim any number."""

IDENTITY_KEYS = ("name", "weights_sha256", "resize", "dtype")


@dataclass(frozen=True)
class KeptStatistics:
    """Statistics as a file holds them.

    Attributes:
        statistics: Of the features distances are measured in; n is 0 where the file has none.
        spatial: Of the spatial features of sFID, where the file has them.
        identity: The extractor that made them (`FeatureExtractor.identity`); empty in files of
            other programs, which do not say.
        fingerprint: Of the images they were made of; empty where not said.
    """

    statistics: Statistics
    spatial: Statistics | None = None
    identity: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def write_statistics(path: Path, kept: KeptStatistics) -> None:
    """Write statistics with what they were made with, whole or not at all."""
    arrays: dict[str, Any] = dict(kept.statistics._asdict())
    if kept.spatial:
        arrays |= {"mu_s": kept.spatial.mu, "sigma_s": kept.spatial.sigma}
    with atomic_file(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays, **kept.identity, fingerprint=kept.fingerprint)


def read_statistics(path: Path) -> KeptStatistics:
    """Read ``mu`` (D,) and ``sigma`` (D, D), and what else the file says.

    pytorch-fid's files hold no more than these two; ADM's add ``mu_s`` and ``sigma_s`` of the
    spatial features; ours add n, the extractor and the fingerprint of the images.

    Raises:
        UserError: No such file, or arrays that are missing, do not fit or are not finite.
    """
    arrays = read_arrays(
        path, ("mu", "sigma", "mu_s", "sigma_s", "n", "fingerprint", *IDENTITY_KEYS)
    )
    missing = sorted({"mu", "sigma"} - set(arrays))
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; expected statistics (mu, sigma and, if known, n) "
            "or images (arr_0, uint8 NHWC)"
        )
    n = arrays.get("n", np.array(0))
    if n.size != 1 or n.dtype.kind not in "iuf" or not 0 <= n.item() < 2**63:
        raise UserError(f"{path} holds n as {n.dtype} of shape {n.shape}; expected one number")
    main = _checked(path, arrays["mu"], arrays["sigma"], int(n.item()))
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        spatial = _checked(path, arrays["mu_s"], arrays["sigma_s"], main.n)
    identity = {key: str(arrays[key]) for key in IDENTITY_KEYS if key in arrays}
    if identity and len(identity) < len(IDENTITY_KEYS):
        lost = sorted(set(IDENTITY_KEYS) - set(identity))
        raise UserError(f"{path} names its extractor without {', '.join(lost)}; make it again")
    return KeptStatistics(main, spatial, identity, str(arrays.get("fingerprint", "")))


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Those arrays of an .npz that are asked for; no pickle is opened.

    Raises:
        UserError: No such file, it is no whole .npz, or it unpacks to more than `UNPACKED_LIMIT`.
    """
    try:
        # Opened here because np.load leaks the handle of a broken zip.
        with path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, NpzFile):
                return {}
            wanted = [name for name in names if name in file.files]
            assert file.zip is not None  # it is open
            members = file.zip.infolist()
            # No member gives more bytes than its entry says: zipfile stops there.
            sizes = {info.filename: info.file_size for info in members}
            size = sum(sizes.get(f"{name}.npy", sizes.get(name, 0)) for name in wanted)
            if size > UNPACKED_LIMIT:
                raise UserError(
                    f"{path} unpacks to {size / 2**30:.1f} GiB and at most "
                    f"{UNPACKED_LIMIT / 2**30:g} are read at once; images that numpy.savez stores "
                    "uncompressed are read one by one"
                )
            arrays = {name: file[name] for name in wanted}
            # Of a member that does not begin as an array numpy gives the bytes.
            if lost := [name for name, found in arrays.items() if isinstance(found, bytes)]:
                raise UserError(f"{path} cannot be read as .npz ({', '.join(lost)}: no array)")
            return arrays
    except UserError:
        raise
    # zipfile, zlib and numpy raise almost anything on broken bytes (NotImplementedError for an
    # unknown compression, RuntimeError for a password, MemoryError for an impossible shape, …).
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if "allow_pickle" in said or "Object arrays" in said:
            said = "it holds Python objects as a pickle, which is not opened"
        raise UserError(f"{path} cannot be read as .npz ({said})") from error


def _checked(path: Path, mu: Float64, sigma: Float64, n: int) -> Statistics:
    if mu.dtype.kind not in "iuf" or sigma.dtype.kind not in "iuf":
        raise UserError(
            f"{path} holds mu as {mu.dtype} and sigma as {sigma.dtype}; expected numbers"
        )
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise UserError(
            f"{path} holds mu {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds values that are not finite; make the statistics again")
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), n)


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


# The two sides of an evaluation: what is measured, what it is measured against, which labels.

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Real images, with training images where the source has them, or statistics alone."""

    images: ImageSet | None = None
    train: Callable[[], ImageSet] | None = None
    statistics: KeptStatistics | None = None
    data: "DataConfig | None" = None


def open_target(
    target: "str | Path | ComplexityDiTPipeline", device: torch.device, data: "DataConfig | None"
) -> "ImageSet | ComplexityDiTPipeline":
    """What is measured: a pipeline, or images of a folder, an .npz or a source's training split.

    Raises:
        UserError: It is none of these, or cannot be read.
    """
    if not isinstance(target, str | Path):
        return target
    path = Path(target)
    if str(target).endswith(".npz"):
        images = npz_images(path)
        if images is None:
            raise UserError(f"{path} holds no images (arr_0); statistics can only be a --reference")
        return images
    if is_source(str(target)):
        return _split(_read_as(str(target), data), "train", "training images")
    networks = ("model_index.json", ADAPTER_FILE)
    if path.is_dir() and not any((path / name).is_file() for name in networks):
        return folder_images(path)
    # Imported here: two folders of images need no diffusion library.
    from complexity_dit.pipelines.sampling import load_pipeline

    return load_pipeline(str(target)).to(device)


def open_reference(reference: str, size: tuple[int, int], data: "DataConfig | None") -> Reference:
    """What is measured against: images, or statistics.

    Args:
        reference: A source (its held-out split), a folder, or an .npz of images or statistics.
        size: Height and width of the images to evaluate; a source is read at that size.
        data: How a source is read.

    Raises:
        UserError: It is none of these, cannot be read, or a source is asked for at no square size.
    """
    if reference.endswith(".npz"):
        images = npz_images(Path(reference))
        if images is not None:
            return Reference(images=images)
        return Reference(statistics=read_statistics(Path(reference)))
    if not is_source(reference):
        return Reference(images=folder_images(Path(reference)))
    if size[0] != size[1]:
        raise UserError(
            f"the images to evaluate are {size[1]}x{size[0]}, and {reference} is read as squares; "
            "give a folder of images as reference"
        )
    read = replace(_read_as(reference, data), resolution=size[0])
    return Reference(
        images=_split(read, "heldout", "held-out images"),
        train=lambda: _split(read, "train", "training images"),
        data=read,
    )


def trained_on(target: object) -> "DataConfig | None":
    """The data that a pipeline folder says it was trained on."""
    from complexity_dit.config import DataConfig

    if not isinstance(target, str | Path) or not (Path(target) / DATA_FILE).is_file():
        return None
    try:
        return filled(DataConfig, read_json_object(Path(target) / DATA_FILE))
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(target) / DATA_FILE} is no DataConfig: {error}") from error


def labels_for_samples(
    pipe: "ComplexityDiTPipeline", n: int, real: ImageSet | None, rows: NDArray[np.int64]
) -> tuple[torch.Tensor, dict[str, NDArray[np.int64]]]:
    """The label rows of n samples in the pipeline's ids: those of the real images drawn.

    Returns:
        Labels (n, F) int64 with -1 for not given, and by field the ids asked for (n,) as the
        reference numbers them; fields of which nothing is asked for are left out.
    """
    labels = torch.full((n, len(pipe.id2label)), -1, dtype=torch.int64)
    asked: dict[str, NDArray[np.int64]] = {}
    for name, names in real.label_names.items() if real else ():
        if real is None or name not in pipe.id2label:
            continue
        # Fewer real images than samples: their label rows are asked for again in turn.
        wanted = real.column(name)[np.resize(rows, n)]
        mapped = _renamed(wanted, names, list(pipe.id2label[name].items()))
        unknown = int(((mapped < 0) & (wanted >= 0)).sum())
        if unknown:
            logger.warning(
                "%d of %d %s labels are unknown to the pipeline: not asked for", unknown, n, name
            )
        labels[:, list(pipe.id2label).index(name)] = torch.from_numpy(mapped)
        if (mapped >= 0).any():
            asked[name] = np.where(mapped >= 0, wanted, -1)
    if pipe.id2label and bool((labels < 0).all()):
        logger.warning("no labels are asked for: the samples are unconditional")
    return labels, asked


def labels_in_reference_ids(
    subject: ImageSet, field: str | None, names: list[str]
) -> NDArray[np.int64] | None:
    """A field's ids of a set's images as a reference with these names has them; None without."""
    if field is None or field not in subject.label_names:
        return None
    return _renamed(subject.column(field), subject.label_names[field], list(enumerate(names)))


def _renamed(
    ids: NDArray[np.int64], names: list[str], others: list[tuple[int, str]]
) -> NDArray[np.int64]:
    """Ids of ``names`` as ids of the same names among others; -1 where there is none."""
    known = {name: i for i, name in others}
    # The last entry is where -1, a missing label, looks.
    return np.array([*(known.get(name, -1) for name in names), -1], np.int64)[ids]


def _read_as(source: str, data: "DataConfig | None") -> "DataConfig":
    from complexity_dit.config import DataConfig

    return replace(data or DataConfig(), source=source)


def _split(data: "DataConfig", split: str, name: str) -> ImageSet:
    from complexity_dit.data.dataset import load_data

    return dataset_images(main_first(lambda: load_data(data, split)), name)
