"""Readers of the three kinds of source, each through one cached `datasets` map.

Every source becomes two tables with the same rows: the prepared images (`pixels` as the bytes of a
uint8 (3, H, W) picture, `sha256` of the file, its `name`, and the `reason` when it cannot be used)
and the source's own columns, from which labels are read.
"""

import gc
import hashlib
import inspect
import logging
import os
import warnings
import zlib
from glob import escape
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import datasets
import PIL
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import constants
from torchvision.transforms.v2 import functional as F

from complexity_dit.config import DataConfig
from complexity_dit.data import art
from complexity_dit.hub import _SOURCE_HINT, reach_hub
from complexity_dit.pictures import MAX_FILE_BYTES, VERSION, square_pixels
from inl_core.run.errors import UserError
from inl_core.run.json_files import one_line

_ART_HASH_SIZE = 32  # the split of the art set is by the picture at this size

log = logging.getLogger(__name__)


def read_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Read, decode and hash every image of a source, or map what an earlier call cached.

    Returns:
        The prepared images and the source's own columns, with the same rows.

    Raises:
        UserError: The source cannot be read, has no images, or (`config.strict`) has a bad one.
    """
    try:
        if config.source == "art":
            return _draw_art(config)
        table = _load_table(config.source)
        column = _image_column(table, config.image_column)
        return _prepare_images(table.select_columns(column), column, config), table
    except OSError as error:
        raise UserError(f"stopped while reading {config.source}: {error}") from error


def _draw_art(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    count = config.num_images
    labels = [art.labels_of(i) for i in range(count)]
    features = {f: datasets.ClassLabel(names=list(names)) for f, names in art.LABEL_NAMES.items()}
    columns = datasets.Dataset.from_dict(
        {field: [row[field] for row in labels] for field in features},
        features=datasets.Features(features),
    )
    # Both the code and what it draws here: NumPy takes part in the result.
    probe = [art.paint(i, _ART_HASH_SIZE).tobytes() for i in range(min(count, 32))]
    key = Hasher.hash([VERSION, inspect.getsource(art), probe, count, config.resolution])
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "complexity_dit_art"
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"index": range(count)}).map(
        _draw_row,
        fn_kwargs={"resolution": config.resolution},
        new_fingerprint=key,
        cache_file_name=str(folder / f"{key}.arrow"),
        desc=f"drawing the art set at {config.resolution} px",
        **_map_settings(config, "index"),
    )
    return rows, columns


def _draw_row(row: dict[str, Any], *, resolution: int) -> dict[str, Any]:
    picture = art.paint(row["index"], resolution)
    same_size = resolution == _ART_HASH_SIZE
    hashed = picture if same_size else art.paint(row["index"], _ART_HASH_SIZE)
    return {
        "pixels": F.pil_to_tensor(picture).numpy().tobytes(),
        "sha256": hashlib.sha256(hashed.tobytes()).hexdigest(),
        "name": f"art {row['index']}",
        "reason": "",
    }


def _load_table(source: str) -> datasets.Dataset:
    scheme, _, name = source.partition(":")
    try:
        if scheme == "imagefolder":
            return _load_folder(name)
        if not os.path.isdir(name):
            reach_hub(source)
        splits = datasets.load_dataset(name)
        if len(splits) > 1:
            sizes = ", ".join(f"{split} ({len(rows)})" for split, rows in splits.items())
            log.info("%s: joining its splits %s", source, sizes)
        return datasets.concatenate_datasets(list(splits.values()))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        message = (str(cause) or type(cause).__name__).splitlines()[0]
        hint = _SOURCE_HINT if scheme == "hub" else "check the folder and its metadata file"
        raise UserError(f"cannot read {source}: {message}; {hint}") from error


def _load_folder(name: str) -> datasets.Dataset:
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"imagefolder:{name}: {folder} is not a folder; give one with images in it")
    suffixes = {*ImageFolder.EXTENSIONS, ".zip"}
    if not any(path.suffix.lower() in suffixes for path in folder.rglob("*")):
        raise UserError(f"imagefolder:{name}: there are no images in {folder}")
    # One pattern for everything: otherwise `datasets` takes a file called
    # "the-train-in-the-snow.jpg" for the train split and drops all other files.
    pattern = escape(str(folder)) + "/**"
    builder = datasets.load_dataset_builder("imagefolder", data_files=[pattern])
    if not os.path.exists(builder.cache_dir):
        with warnings.catch_warnings():
            # Building leaves metadata.csv open in a reference cycle: collect it here, quietly.
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                builder.download_and_prepare()
            finally:
                gc.collect()
    splits = sorted(p.name for p in folder.iterdir() if p.name in ("train", "test", "validation"))
    if splits:
        log.info("imagefolder:%s: joining its splits %s", name, ", ".join(splits))
    return cast(datasets.Dataset, builder.as_dataset(split="train"))


def _image_column(table: datasets.Dataset, wanted: str | None) -> str:
    columns = [name for name, f in table.features.items() if isinstance(f, datasets.Image)]
    if wanted is None and "image" in columns:
        return "image"
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted in columns:
        return str(wanted)
    problem = "no image_column is set" if wanted is None else f"image_column {wanted!r} is not one"
    raise UserError(
        f"the image columns of the data are {columns} among {table.column_names}; {problem}"
    )


def _map_settings(config: DataConfig, column: str) -> dict[str, Any]:
    text = datasets.Value("string")
    return {
        "remove_columns": [column],
        "num_proc": config.num_workers or None,
        # Rows are collected before they are written: bound their bytes, not their number.
        "writer_batch_size": max(1, min(1000, 2**25 // (3 * config.resolution**2))),
        "features": datasets.Features(
            {"pixels": datasets.Value("binary"), "sha256": text, "name": text, "reason": text}
        ),
    }


def _prepare_images(images: datasets.Dataset, column: str, config: DataConfig) -> datasets.Dataset:
    images = images.cast_column(column, datasets.Image(decode=False))
    # The key is made by hand: `datasets` hashes an importable function by its name alone, and
    # `strict` must share the cache of the tolerant run.
    key = Hasher.hash([VERSION, PIL.__version__, images._fingerprint, column, config.resolution])
    return images.map(
        _prepare_row,
        with_indices=True,
        fn_kwargs={
            "column": column,
            "roots": _allowed_roots(config.source),
            "resolution": config.resolution,
            "strict": config.strict,
        },
        new_fingerprint=key,
        desc=f"decoding images at {config.resolution} px",
        **_map_settings(config, column),
    )


def _prepare_row(
    row: dict[str, Any], index: int, *, column: str, roots: list[str], resolution: int, strict: bool
) -> dict[str, Any]:
    image = row[column] or {"path": None, "bytes": None}
    path = image["path"]
    name = f"{one_line(path)} (row {index})" if path else f"the image of row {index}"
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
    sha256 = hashlib.sha256(data).hexdigest()
    return {"pixels": pixels, "sha256": sha256, "name": name, "reason": reason}


def _allowed_roots(source: str) -> list[str]:
    """List the folders that a source may read from: its own, or the caches of the hub."""
    scheme, _, name = source.partition(":")
    folder = Path(name).expanduser()
    if scheme == "imagefolder" or folder.is_dir():
        return [str(folder.resolve()), os.path.abspath(folder)]
    caches = (constants.HF_HUB_CACHE, datasets_config.HF_DATASETS_CACHE)
    return [os.path.abspath(cache) for cache in caches]


def _file_bytes(image: dict[str, Any], roots: list[str]) -> bytes:
    """Read a picture within `roots`; its path comes from a metadata file that anyone may write."""
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
        if size is not None and size > MAX_FILE_BYTES:
            raise UserError(f"has {size} bytes, and at most {MAX_FILE_BYTES} are read")
        return cast(bytes, files.cat_file(path))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("is not there") from error
    except (ValueError, RuntimeError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"cannot be read: {error}") from error
