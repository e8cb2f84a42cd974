"""The three kinds of source, each read through one cached ``datasets`` map.

Every source becomes two tables with the same rows: the prepared images (``pixels`` as the bytes of
a uint8 (3, H, W) picture, ``sha256`` of the file, its ``name``, and the ``reason`` when it cannot
be used) and the columns as they came, from which labels are read.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import logging
import os
import warnings
import zlib
from collections.abc import Iterator
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zipfile import BadZipFile

import datasets
import numpy as np
import PIL
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import constants
from PIL import Image, ImageOps, UnidentifiedImageError

from complexity_dit.data import art
from complexity_dit.hub import _SOURCE_HINT, reach_hub
from inl_core.run.errors import UserError
from inl_core.run.json_files import one_line

if TYPE_CHECKING:
    from complexity_dit.config import DataConfig


# From the bytes of any image file to a square RGB picture, or a sentence about what is wrong.

VERSION = 1
"""Part of every cache key and fingerprint: raise it when ``square_pixels`` changes its output."""


def square_pixels(data: bytes, resolution: int) -> np.ndarray:
    """Decode an image file into a square picture.

    Animations give their first frame; transparency goes over white; grey, palette and CMYK become
    RGB; 16-bit grey keeps its high byte; embedded colour profiles are not applied. The largest
    centred square is then scaled with an antialiased Lanczos filter.

    Args:
        data: The bytes of the file.
        resolution: Side of the result in pixels.

    Returns:
        uint8 of shape (3, resolution, resolution), RGB.

    Raises:
        UserError: The bytes are no picture Pillow can read whole, the picture is over its
            decompression-bomb limit, or a side is smaller than ``resolution``.
    """
    with bombs_refused():
        try:
            image = Image.open(BytesIO(data))
            width, height = image.size
            if min(width, height) < resolution:
                raise UserError(
                    f"{width}×{height} pixels, smaller than the crop of {resolution}×{resolution}"
                )
            # JPEG can shrink by 2, 4 or 8 while decoding; stay at twice the size we need.
            scale = 2 * resolution / min(width, height)
            image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise UserError("is no image: Pillow cannot identify its format") from error
        # Pillow's parsers raise almost anything on broken bytes (OSError, SyntaxError, KeyError,
        # struct.error, …), and all of it means the same here.
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else "no message"
            raise UserError(f"cannot be decoded ({type(error).__name__}: {said})") from error
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    square = rgb.resize(
        (resolution, resolution),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    return np.asarray(square).transpose(2, 0, 1)


@contextlib.contextmanager
def bombs_refused() -> Iterator[None]:
    """Inside, Pillow raises for a picture over its limit of 89 megapixels, before it decodes it."""
    with warnings.catch_warnings():
        # Other remarks are on metadata and do not concern the pixels.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey from {grey.min()} to {grey.max()}; save it as 8 or 16 bit")
        # convert("RGB") would clip everything above 255 to white.
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


_ART_HASH_SIZE = 32
_LARGEST_FILE = 2**29  # bytes of one picture's file, also unpacked
_ROW_COLUMNS = {"pixels": "binary", "sha256": "string", "name": "string", "reason": "string"}

log = logging.getLogger(__name__)


def read_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Read, decode and hash a whole source, or map what an earlier call cached.

    Returns:
        The prepared images and the source's own columns, row by row the same pictures.

    Raises:
        UserError: The source cannot be read, has no images, or (``config.strict``) has a bad one.
    """
    try:
        if config.source == "art":
            return _art_rows(config)
        table = _read_source(config.source)
        image = _image_column(table, config.image_column)
        roots = _roots(config.source)
        return _image_rows(table.select_columns(image), image, config, roots), table
    except OSError as error:
        raise UserError(f"stopped while reading {config.source}: {error}") from error


def _art_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw the art set (cached by what the painter paints) and look up its labels."""
    count = config.num_images
    labels = [art.labels_of(i) for i in range(count)]
    features = {f: datasets.ClassLabel(names=list(names)) for f, names in art.LABEL_NAMES.items()}
    columns = datasets.Dataset.from_dict(
        {field: [row[field] for row in labels] for field in features},
        features=datasets.Features(features),
    )
    probe = [art.paint(i, _ART_HASH_SIZE).tobytes() for i in range(min(count, 32))]
    key = Hasher.hash([VERSION, inspect.getsource(art), probe, count, config.resolution])
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "complexity_dit_art"
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"index": range(count)}).map(
        _paint_row,
        fn_kwargs={"resolution": config.resolution},
        new_fingerprint=key,
        cache_file_name=str(folder / f"{key}.arrow"),
        desc=f"painting the art set at {config.resolution} px",
        **_map_settings(config, ["index"]),
    )
    return rows, columns


def _read_source(source: str) -> datasets.Dataset:
    scheme, _, name = source.partition(":")
    try:
        if scheme == "imagefolder":
            return _read_folder(name)
        if not os.path.isdir(name):
            reach_hub(source)
        parts = datasets.load_dataset(name)
        if len(parts) > 1:
            sizes = ", ".join(f"{split} ({len(part)})" for split, part in parts.items())
            log.info("%s: its splits %s are put together", source, sizes)
        return datasets.concatenate_datasets(list(parts.values()))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = (str(cause) or type(cause).__name__).splitlines()[0]
        help_text = _SOURCE_HINT if scheme == "hub" else "check the folder and its metadata file"
        raise UserError(f"cannot read {source}: {said}; {help_text}") from error


def _read_folder(name: str) -> datasets.Dataset:
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"imagefolder:{name}: {folder} is not a folder; give one with images in it")
    suffixes = {*ImageFolder.EXTENSIONS, ".zip"}
    if not any(path.suffix.lower() in suffixes for path in folder.rglob("*")):
        raise UserError(f"imagefolder:{name}: there are no images in {folder}")
    # With one pattern for everything, a file called "the-train-in-the-snow.jpg" stays a picture;
    # left alone, `datasets` takes such names for the train split and drops all other files.
    pattern = escape(str(folder)) + "/**"
    builder = datasets.load_dataset_builder("imagefolder", data_files=[pattern])
    if not os.path.exists(builder.cache_dir):
        with warnings.catch_warnings():
            # Building leaves metadata.csv open in a reference cycle: close it here, quietly.
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                builder.download_and_prepare()
            finally:
                gc.collect()
    rows = cast(datasets.Dataset, builder.as_dataset(split="train"))
    parts = sorted(p.name for p in folder.iterdir() if p.name in ("train", "test", "validation"))
    if parts:
        log.info("imagefolder:%s: its splits %s are put together", name, ", ".join(parts))
    return rows


def _image_column(rows: datasets.Dataset, asked: str | None) -> str:
    found = [name for name, f in rows.features.items() if isinstance(f, datasets.Image)]
    if asked is None and "image" in found:
        return "image"
    if asked is None and len(found) == 1:
        return found[0]
    if asked in found:
        return str(asked)
    wanted = "no image_column is set" if asked is None else f"image_column {asked!r} is not one"
    raise UserError(
        f"the image columns of the data are {found} among {rows.column_names}; {wanted}"
    )


def _map_settings(config: DataConfig, remove: list[str]) -> dict[str, Any]:
    return {
        "remove_columns": remove,
        "num_proc": config.num_workers or None,
        # Rows are collected before they are written: bound them by bytes, not by number.
        "writer_batch_size": max(1, min(1000, 2**25 // (3 * config.resolution**2))),
        "features": datasets.Features(
            {name: datasets.Value(kind) for name, kind in _ROW_COLUMNS.items()}
        ),
    }


def _roots(source: str) -> list[str]:
    """Folders that pictures of a source may be read from: its own, or the caches of the hub."""
    scheme, _, name = source.partition(":")
    folder = Path(name).expanduser()
    if scheme == "imagefolder" or folder.is_dir():
        return [str(folder.resolve()), os.path.abspath(folder)]
    caches = (constants.HF_HUB_CACHE, datasets_config.HF_DATASETS_CACHE)
    return [os.path.abspath(cache) for cache in caches]


def _image_rows(
    images: datasets.Dataset, column: str, config: DataConfig, roots: list[str]
) -> datasets.Dataset:
    images = images.cast_column(column, datasets.Image(decode=False))
    # The key is made by hand: `datasets` hashes an importable function by its name alone, and
    # `strict` must share the cache of the tolerant run.
    key = Hasher.hash([VERSION, PIL.__version__, images._fingerprint, column, config.resolution])
    return images.map(
        _prepare_row,
        with_indices=True,
        fn_kwargs={
            "column": column,
            "roots": roots,
            "resolution": config.resolution,
            "strict": config.strict,
        },
        new_fingerprint=key,
        desc=f"decoding images at {config.resolution} px",
        **_map_settings(config, [column]),
    )


def _prepare_row(
    row: dict[str, Any],
    index: int,
    *,
    column: str,
    resolution: int,
    strict: bool,
    roots: list[str],
) -> dict[str, Any]:
    image = row[column] or {"path": None, "bytes": None}
    name = (
        f"{one_line(image['path'])} (row {index})" if image["path"] else f"the image of row {index}"
    )
    data, pixels, reason = b"", b"", ""
    try:
        data = _file_bytes(image, roots)
        pixels = square_pixels(data, resolution).tobytes()
    except UserError as error:
        if strict:
            raise UserError(
                f"{name}: {error} (strict=true stops here; strict=false skips such images)"
            ) from error
        reason = str(error)
    sha = hashlib.sha256(data).hexdigest()
    return {"pixels": pixels, "sha256": sha, "name": name, "reason": reason}


def _file_bytes(image: dict[str, Any], roots: list[str]) -> bytes:
    """The bytes of a picture, which a metadata file names: it must lie in the data set."""
    if image["bytes"] is not None:
        return image["bytes"]
    if image["path"] is None:
        raise UserError("has no image")
    # A member of an archive: "zip://a.jpg::/x.zip".
    member, joint, holder = image["path"].rpartition("::")
    if "://" in holder or (joint and not member.startswith("zip://")):
        raise UserError("is an address; pictures are read from the data set's own folder only")
    inside = os.path.abspath(holder)
    if not any(inside.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        raise UserError(f"lies outside the data set ({roots[0]}); it was not read")
    try:
        files, path = url_to_fs(image["path"]) if joint else (LocalFileSystem(), holder)
        size = files.size(path)
        if size is not None and size > _LARGEST_FILE:
            raise UserError(f"has {size} bytes, and at most {_LARGEST_FILE} are read")
        return cast(bytes, files.cat_file(path))
    except FileNotFoundError as error:
        raise UserError("is not there") from error
    except (
        ValueError,
        RuntimeError,
        NotImplementedError,
        EOFError,
        BadZipFile,
        zlib.error,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be read: {error}") from error


def _paint_row(row: dict[str, Any], *, resolution: int) -> dict[str, Any]:
    picture = art.paint(row["index"], resolution).convert("RGB")
    same = resolution == _ART_HASH_SIZE  # nothing to draw a second time
    canonical = picture if same else art.paint(row["index"], _ART_HASH_SIZE).convert("RGB")
    return {
        "pixels": np.asarray(picture).transpose(2, 0, 1).tobytes(),
        "sha256": hashlib.sha256(canonical.tobytes()).hexdigest(),
        "name": f"art {row['index']}",
        "reason": "",
    }
