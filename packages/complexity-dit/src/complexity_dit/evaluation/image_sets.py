"""Images and statistics that an evaluation compares: folders, .npz files and data sources."""

import contextlib
import hashlib
import logging
import os
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from complexity_dit.config import DATA_FILE, DataConfig
from complexity_dit.data.captions import Captions
from complexity_dit.data.dataset import PaintingDataset, load_data
from complexity_dit.data.folders import as_text, picture_files
from complexity_dit.distributed import main_first
from complexity_dit.evaluation.distances import Statistics
from complexity_dit.evaluation.networks import IDENTITY_KEYS
from complexity_dit.hashing import array_hash, file_sha256
from complexity_dit.pictures import SUFFIXES, file_bytes, read_picture
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sampling import drawn_labels, find_pipeline, load_pipeline
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, open_regular
from inl_core.run.json_files import filled, read_json_object

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images that are read by number.

    Attributes:
        name: Name for progress bars.
        fingerprint: Hash that identifies the images.
        count: Number of images.
        size: Height and width in pixels.
        read: Numbers -> uint8 (n, H, W, 3).
        labels: (count, F) class ids, -1 if missing; F is 0 without labels.
        label_names: Field -> names in the order of their ids; fields in column order.
        block: Number of images that are best read together.
        lasting: Whether the images are those of a data source, whose features are worth caching.
        jpegs: Fraction of the files that are JPEG; None where the images are not files.
        captions: Captions of the images of a source, if they were asked for.
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
    jpegs: float | None = None
    captions: Captions | None = None

    def __len__(self) -> int:
        return self.count

    def column(self, field: str) -> NDArray[np.int64]:
        """Class ids (count,) of one label field."""
        return self.labels[:, list(self.label_names).index(field)]


def folder_images(folder: Path) -> ImageSet:
    """Images of a folder and its sub-folders, in the order of their relative paths.

    Args:
        folder: Folder of image files of one size, preferably PNG.

    Returns:
        Their `ImageSet`; the fingerprint is a sha256 over relative paths and bytes.

    Raises:
        UserError: The folder does not exist or has fewer than 2 images. Reading raises it too,
            naming the file: another size, or a file that `read_picture` refuses.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; expected a folder of images, a statistics .npz, or one of "
            "art, imagefolder:PATH, hub:NAME"
        )
    paths = [Path(file.path) for file in picture_files(folder)]
    if len(paths) < 2:
        raise UserError(
            f"{folder} holds {len(paths)} images ({', '.join(sorted(SUFFIXES))}); a distance "
            "needs at least 2"
        )
    if find_pipeline(folder) is not None:
        raise UserError(f"{folder} holds a model; expected a folder of images")
    digest, jpegs = hashlib.sha256(), 0
    for path in paths:
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0")
        with _named(path):
            data = file_bytes(path)
        digest.update(hashlib.sha256(data).digest())
        jpegs += data.startswith(b"\xff\xd8")
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

    no_labels = np.empty((len(paths), 0), np.int64)
    return ImageSet(
        *(folder.name, digest.hexdigest(), len(paths), (height, width), read, no_labels),
        jpegs=jpegs / len(paths),
    )


def _read_image(path: Path) -> NDArray[np.uint8]:
    with _named(path):
        return np.asarray(read_picture(path))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{as_text(str(path))} {error}; remove or replace it") from error


def dataset_images(dataset: PaintingDataset, name: str) -> ImageSet:
    """A split of a data source, with its labels."""

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        return dataset.pixels(numbers).permute(0, 2, 3, 1).contiguous().numpy()

    side = dataset.resolution
    return ImageSet(
        *(name, dataset.fingerprint, len(dataset), (side, side), read),
        labels=dataset.labels.numpy(),
        label_names=dataset.label_names,
        lasting=True,
        jpegs=dataset.jpegs,
        captions=dataset.captions,
    )


def array_images(
    images: NDArray[Any], name: str = "images", fingerprint: str | None = None
) -> ImageSet:
    """An array of images, uint8 (n, H, W, 3), as a set; its fingerprint is by default a hash.

    Raises:
        UserError: Another dtype or shape (for floats, with the number of non-finite images), or
            fewer than 2 images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        broken = ""
        if np.issubdtype(images.dtype, np.floating) and images.size and images.ndim:
            count = int((~np.isfinite(images)).reshape(len(images), -1).any(1).sum())
            broken = f", {count} image{'s' * (count > 1)} with non-finite values" if count else ""
        raise UserError(
            f"{name} is {images.dtype} of shape {images.shape}{broken}; expected images as uint8 "
            "(n, H, W, 3), made by (x * 255).round().clip(0, 255)"
        )
    if len(images) < 2:
        raise UserError(f"{name} holds {len(images)} images; a distance needs at least 2")
    if 0 in images.shape:
        raise UserError(f"{name} holds images without pixels, of shape {images.shape[1:3]}")
    return ImageSet(
        *(name, fingerprint or array_hash(images), len(images), images.shape[1:3]),
        read=lambda numbers: np.ascontiguousarray(images[list(numbers)]),
        labels=np.empty((len(images), 0), np.int64),
    )


def npz_images(path: Path) -> ImageSet | None:
    """Images of an ADM-style ``.npz``: ``arr_0``, uint8 (N, H, W, 3).

    An array that is stored uncompressed, as by ``numpy.savez``, is memory-mapped.

    Returns:
        Their `ImageSet`, or None if the file has no ``arr_0`` (it may hold statistics).

    Raises:
        UserError: The file does not exist, or as `array_images`.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    stored = _mapped_array(path, "arr_0.npy")
    if stored is None:
        stored = read_arrays(path, ("arr_0",)).get("arr_0")
    return None if stored is None else array_images(stored, f"arr_0 of {path}", file_sha256(path))


def _mapped_array(path: Path, name: str) -> NDArray[Any] | None:
    """Memory map of an uncompressed member of a zip; None for any other member."""
    try:
        with (
            open_regular(path, follow_links=True) as file,
            zipfile.ZipFile(file) as archive,
        ):
            member = archive.getinfo(name)
            if member.compress_type != zipfile.ZIP_STORED:
                return None
            # The local header has 30 bytes, of which the last 4 are the lengths of the name and of
            # an extra field. These follow it, and then the unchanged bytes of the member.
            file.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(member.header_offset + 30 + name_length + extra_length)
            npy = np.lib.format
            first = npy.read_magic(file) == (1, 0)
            read = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if fortran or dtype.hasobject:
                return None
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except Exception:
        # zipfile and numpy raise almost any exception here; `read_arrays` reports what is wrong.
        return None


# Statistics (mu, sigma, n) as .npz. Files of other programs do not name their extractor.

UNPACKED_LIMIT = 4 * 2**30
"""Limit of the unpacked bytes of the arrays of one file, as a small file may claim any size."""


@dataclass(frozen=True)
class KeptStatistics:
    """Statistics in a file.

    Attributes:
        statistics: Of the features in which distances are measured; n is 0 if not in the file.
        identity: The extractor that made them (`FeatureExtractor.identity`); empty in files of
            other programs.
        fingerprint: Hash of the images that they were made of; empty if not in the file.
    """

    statistics: Statistics
    identity: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def write_statistics(path: Path, kept: KeptStatistics) -> None:
    """Write statistics and their extractor atomically."""
    arrays: dict[str, Any] = kept.statistics._asdict()
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays, **kept.identity, fingerprint=kept.fingerprint)


def read_statistics(path: Path) -> KeptStatistics:
    """Read ``mu`` (D,), ``sigma`` (D, D) and the optional arrays.

    Files of pytorch-fid have only these two; `write_statistics` adds n, the extractor and the
    fingerprint of the images. Other arrays, such as ADM's ``mu_s`` and ``sigma_s``, are ignored.

    Raises:
        UserError: The file does not exist, or arrays are missing, do not match or are not finite.
    """
    arrays = read_arrays(path, ("mu", "sigma", "n", "fingerprint", *IDENTITY_KEYS))
    missing = sorted({"mu", "sigma"} - set(arrays))
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; expected statistics (mu, sigma and, if known, n) "
            "or images (arr_0, uint8 NHWC)"
        )
    n = arrays.get("n", np.array(0))
    if n.size != 1 or n.dtype.kind not in "iuf" or not 0 <= n.item() < 2**63:
        raise UserError(f"{path} holds n as {n.dtype} of shape {n.shape}; expected one number")
    mu, sigma = arrays["mu"], arrays["sigma"]
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
    identity = {key: str(arrays[key]) for key in IDENTITY_KEYS if key in arrays}
    if identity and len(identity) < len(IDENTITY_KEYS):
        absent = sorted(set(IDENTITY_KEYS) - set(identity))
        raise UserError(f"{path} names its extractor without {', '.join(absent)}; make it again")
    statistics = Statistics(mu.astype(np.float64), sigma.astype(np.float64), int(n.item()))
    return KeptStatistics(statistics, identity, str(arrays.get("fingerprint", "")))


def _array_names(path: Path) -> set[str]:
    """Names of the arrays of an .npz; none for a file that is not one, as its reader will say."""
    try:
        with open_regular(path, follow_links=True) as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except UserError:
        raise
    except Exception:  # zipfile raises almost any exception on broken bytes
        return set()


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Read the named arrays of an .npz, if present, without opening any pickle.

    Raises:
        UserError: The file does not exist, is not a complete .npz, or unpacks to more than
            `UNPACKED_LIMIT`.
    """
    try:
        # Opened here because np.load leaks the handle of a broken zip.
        with open_regular(path, follow_links=True) as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, NpzFile):
                return {}
            wanted = [name for name in names if name in file.files]
            assert file.zip is not None  # it is open
            # zipfile stops at the size that the entry of a member declares.
            sizes = {info.filename: info.file_size for info in file.zip.infolist()}
            size = sum(sizes.get(f"{name}.npy", sizes.get(name, 0)) for name in wanted)
            if size > UNPACKED_LIMIT:
                raise UserError(
                    f"{path} unpacks to {size / 2**30:.1f} GiB, and at most "
                    f"{UNPACKED_LIMIT / 2**30:g} are read at once; images stored uncompressed, as "
                    "by numpy.savez, are read one by one"
                )
            arrays = {name: file[name] for name in wanted}
            # numpy returns the bytes of a member that does not begin like an array.
            if broken := [name for name, array in arrays.items() if isinstance(array, bytes)]:
                raise UserError(
                    f"{path} cannot be read as .npz ({', '.join(broken)}: not an array)"
                )
            return arrays
    except UserError:
        raise
    # zipfile, zlib and numpy raise almost any exception on broken bytes (NotImplementedError for an
    # unknown compression, RuntimeError for a password, MemoryError for an impossible shape, ...).
    except Exception as error:
        error_text = f"{type(error).__name__}: {error}"
        if "allow_pickle" in error_text or "Object arrays" in error_text:
            error_text = "it holds Python objects as a pickle, which is not opened"
        raise UserError(f"{path} cannot be read as .npz ({error_text})") from error


# Both sides of an evaluation, and the labels of the samples


@dataclass(frozen=True)
class Reference:
    """Real images, with a function for the training images of a source, or statistics alone."""

    images: ImageSet | None = None
    train: Callable[[], ImageSet] | None = None
    statistics: KeptStatistics | None = None
    data: DataConfig | None = None


def is_source(text: str) -> bool:
    """Whether a reference is a data source (``art``, ``imagefolder:PATH``, ``hub:NAME``)."""
    return text == "art" or text.startswith(("imagefolder:", "hub:"))


def open_target(
    target: str | Path | ComplexityDiTPipeline, device: torch.device, data: DataConfig | None
) -> ImageSet | ComplexityDiTPipeline:
    """Open a pipeline, or the images of a folder, an .npz or a source's training split.

    Raises:
        UserError: It is none of these, or cannot be read.
    """
    if not isinstance(target, str | Path):
        return target
    path, text = Path(target), str(target)
    if text.endswith(".npz"):
        if images := npz_images(path):
            return images
        raise UserError(f"{path} holds no images (arr_0); statistics can only be a --reference")
    if is_source(text):
        return _split(replace(data or DataConfig(), source=text, crop="center"), "train")
    if path.is_dir() and find_pipeline(path) is None:
        return folder_images(path)
    return load_pipeline(text).to(device)


def open_reference(
    reference: str, size: tuple[int, int], data: DataConfig | None, captions: bool = False
) -> Reference:
    """Open reference images or statistics.

    Args:
        reference: A source (its held-out split), a folder, or an .npz of statistics (also if it
            has images beside them) or images.
        size: Height and width of the images to evaluate; a source is read at that size.
        data: How a source is read.
        captions: Whether the captions of a source are needed too.

    Raises:
        UserError: It is none of these, cannot be read, or is a source and ``size`` is not square.
    """
    path = Path(reference)
    if reference.endswith(".npz"):
        images = None
        if {"mu", "sigma"} <= (names := _array_names(path)):
            # ADM's files of references hold a few pictures beside the statistics of all.
            if "arr_0" in names:
                logger.info("%s holds statistics and images: the statistics are used", path)
        else:
            images = npz_images(path)
        return Reference(images, statistics=None if images else read_statistics(path))
    if not is_source(reference):
        return Reference(folder_images(path))
    if size[0] != size[1]:
        raise UserError(
            f"the images to evaluate are {size[1]}x{size[0]}, and {reference} is read as squares; "
            "give a folder of images as reference"
        )
    source = replace(data or DataConfig(), source=reference, resolution=size[0], crop="center")
    heldout, train = (partial(_split, source, split, captions) for split in ("heldout", "train"))
    return Reference(heldout(), train=train, data=source)


def _split(data: DataConfig, split: str, captions: bool = False) -> ImageSet:
    name = {"train": "training images", "heldout": "held-out images"}[split]
    return dataset_images(main_first(lambda: load_data(data, split, captions)), name)


def trained_on(target: object) -> DataConfig | None:
    """Read the data configuration with which a pipeline folder was trained, if it has one."""
    folder = find_pipeline(Path(target)) if isinstance(target, str | Path) else None
    if folder is None or not (path := folder / DATA_FILE).is_file():
        return None
    try:
        return filled(DataConfig, read_json_object(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a DataConfig: {error}") from error


def labels_for_samples(
    pipe: ComplexityDiTPipeline,
    n: int,
    real: ImageSet | None,
    rows: NDArray[np.int64],
    seed: int = 0,
) -> tuple[torch.Tensor, dict[str, NDArray[np.int64]]]:
    """Label rows for n samples: those of the drawn real images, in the pipeline's ids.

    Fields that the real images do not have are drawn from the training pictures that have the
    labels of the others, with `seed`, that of the samples.

    Returns:
        Labels (n, F) int64 with -1 for not given, and by field the requested ids (n,) in the
        numbering of the reference; fields without a request are left out.
    """
    labels = torch.full((n, len(pipe.id2label)), -1, dtype=torch.int64)
    asked: dict[str, NDArray[np.int64]] = {}
    for name, names in real.label_names.items() if real else ():
        if real is None or name not in pipe.id2label:
            continue
        # With fewer real images than samples, their label rows are repeated.
        wanted = real.column(name)[np.resize(rows, n)]
        mapped = _renamed(wanted, names, list(pipe.id2label[name].items()))
        unknown = int(((mapped < 0) & (wanted >= 0)).sum())
        if unknown:
            logger.warning(
                "%d of %d %s labels are unknown to the pipeline and are not used", unknown, n, name
            )
        labels[:, list(pipe.id2label).index(name)] = torch.from_numpy(mapped)
        if (mapped >= 0).any():
            asked[name] = np.where(mapped >= 0, wanted, -1)
    absent = [
        i for i, field in enumerate(pipe.id2label) if not real or field not in real.label_names
    ]
    labels[:, absent] = drawn_labels(pipe, labels, seed)[:, absent]
    if pipe.id2label and bool((labels < 0).all()):
        logger.warning("no labels are given: the samples are unconditional")
    return labels, asked


def prompts_for_samples(
    pipe: ComplexityDiTPipeline,
    n: int,
    real: ImageSet | None,
    rows: NDArray[np.int64],
    seed: int = 0,
) -> list[str] | None:
    """Prompts for n samples: the captions of the drawn real images; None for a pipeline without."""
    if pipe.text_encoder is None:
        return None
    if real is None or real.captions is None:
        logger.warning("the reference has no captions: the samples are those of the null text")
        return None
    return real.captions.captions_of(np.resize(rows, n).tolist(), seed, 0)


def labels_in_reference_ids(images: ImageSet, field: str, names: list[str]) -> NDArray[np.int64]:
    """Ids of a field of a set in the numbering of a reference with these names."""
    return _renamed(images.column(field), images.label_names[field], list(enumerate(names)))


def _renamed(
    ids: NDArray[np.int64], names: list[str], others: list[tuple[int, str]]
) -> NDArray[np.int64]:
    """Ids of ``names`` as ids of the same names among others; -1 if there is none."""
    numbers = {name: i for i, name in others}
    # -1, a missing label, indexes the last entry.
    return np.array([*(numbers.get(name, -1) for name in names), -1], np.int64)[ids]
