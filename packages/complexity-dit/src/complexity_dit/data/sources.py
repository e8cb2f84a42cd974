"""Readers of the three kinds of source, each through one cached `datasets` map.

Every source becomes two tables with the same rows: the prepared images (`pixels` as the bytes of a
uint8 (3, H, W) picture, for random crops its `height`, `sha256` of the file, its `name`, and the
`reason` when it cannot be used) and the source's own columns, from which labels are read.
"""

import hashlib
import inspect
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import datasets
import PIL
import pyarrow as pa
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from fsspec.core import url_to_fs
from huggingface_hub import constants
from torchvision.transforms.v2 import functional as F

from complexity_dit.config import DataConfig
from complexity_dit.data import art
from complexity_dit.data.folders import as_text, pick_column, read_folder, scan
from complexity_dit.hub import _SOURCE_HINT, reach_hub
from complexity_dit.pictures import MAX_FILE_BYTES, VERSION, file_bytes, square_pixels, whole_pixels
from inl_core.run.dataset_files import check_card, check_data_files
from inl_core.run.errors import UserError
from inl_core.run.json_files import one_line

_ART_HASH_SIZE = 32  # the split of the art set is by the picture at this size

log = logging.getLogger(__name__)


def read_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """Read, decode and hash every image of a source, or map what an earlier call cached.

    Returns:
        The prepared images and the source's own columns, with the same rows, and what of the
        source is in neither, as "NUMBER REASON".

    Raises:
        UserError: The source cannot be read, has no images, or (`config.strict`) has a bad one.
    """
    scheme, _, name = config.source.partition(":")
    try:
        if scheme == "art":
            return *_draw_art(config), []
        if scheme == "imagefolder":
            table = read_folder(name, config.image_column)
            paths = datasets.Dataset.from_dict({"path": pa.array(table.paths, pa.binary())})
            return _prepare_images(paths, "path", table.key, config), table.columns, table.left_out
        rows = _load_table(name)
        images = [column for column, f in rows.features.items() if isinstance(f, datasets.Image)]
        column = pick_column(images, config.image_column, rows.column_names)
        encoded = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        return _prepare_images(encoded, column, encoded._fingerprint, config), rows, []
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
    rows = _map_once(
        datasets.Dataset.from_dict({"index": range(count)}),
        _draw_row,
        {"resolution": config.resolution},
        f"complexity_dit_art/{key}",
        f"drawing the art set at {config.resolution} px",
        config,
    )
    return rows, columns


def _draw_row(row: dict[str, Any], index: int, *, resolution: int) -> dict[str, Any]:
    picture = art.paint(index, resolution)
    same_size = resolution == _ART_HASH_SIZE
    hashed = picture if same_size else art.paint(index, _ART_HASH_SIZE)
    return {
        "pixels": F.pil_to_tensor(picture).numpy().tobytes(),
        "sha256": hashlib.sha256(hashed.tobytes()).hexdigest(),
        "name": f"art {index}",
        "reason": "",
    }


def _load_table(name: str) -> datasets.Dataset:
    """All rows of a data set of the Hub, or of a folder that `datasets` can read."""
    try:
        folder = Path(name) if os.path.isdir(name) else None
        if folder:
            check_card(folder)
            # `datasets` knows a local file by its time alone.
            stamps = [(file.path, file.stamp) for file in scan(folder, Counter())]
            cache = os.path.join(datasets_config.HF_DATASETS_CACHE, Hasher.hash(stamps))
        else:
            reach_hub(f"hub:{name}")
            cache = None
        builder = datasets.load_dataset_builder(name, cache_dir=cache)
        check_data_files(builder.config.data_files, name, folder)
        try:
            splits = datasets.load_dataset(name, cache_dir=cache)
        except (OSError, ValueError):
            # Part of the cache may have been removed, as clean-up programs do: build it again.
            again = datasets.DownloadMode.REUSE_CACHE_IF_EXISTS
            splits = datasets.load_dataset(name, cache_dir=cache, download_mode=again)
        if len(splits) > 1:
            sizes = ", ".join(f"{split} ({len(rows)})" for split, rows in splits.items())
            log.info("hub:%s: joining its splits %s", name, sizes)
        return datasets.concatenate_datasets(list(splits.values()))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        message = (str(cause) or type(cause).__name__).splitlines()[0]
        raise UserError(f"cannot read hub:{name}: {message}; {_SOURCE_HINT}") from error


def _map_once(
    rows: datasets.Dataset,
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    name: str,
    description: str,
    config: DataConfig,
) -> datasets.Dataset:
    """Prepare every row, or map the files of that name in the cache of `datasets`."""
    target = Path(datasets_config.HF_DATASETS_CACHE) / f"{name}.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    for cached in target.parent.glob(f"{target.stem}*.arrow"):  # one for each process
        try:
            datasets.Dataset.from_file(str(cached))
        except (OSError, pa.ArrowException):
            cached.unlink()  # damaged; made again below
    text = datasets.Value("string")
    return rows.map(
        function,
        with_indices=True,
        fn_kwargs=arguments,
        new_fingerprint=target.stem,
        cache_file_name=str(target),
        desc=description,
        remove_columns=rows.column_names,
        num_proc=config.num_workers or None,
        # Rows are collected before they are written: bound their bytes, not their number.
        writer_batch_size=max(1, min(1000, 2**25 // (3 * config.resolution**2))),
        features=datasets.Features(
            {"pixels": datasets.Value("binary"), "sha256": text, "name": text, "reason": text}
            | ({"height": datasets.Value("int32")} if arguments.get("whole") else {})
        ),
    )


def _prepare_images(
    images: datasets.Dataset, column: str, key: str, config: DataConfig
) -> datasets.Dataset:
    # The key is made by hand: `datasets` hashes an importable function by its name alone, and
    # `strict` must share the cache of the tolerant run.
    parts = [VERSION, PIL.__version__, key, column, config.resolution]
    key = Hasher.hash(parts if config.crop == "center" else [*parts, config.crop])
    arguments = {
        "column": column,
        "roots": _allowed_roots(config.source),
        "resolution": config.resolution,
        "strict": config.strict,
        "whole": config.crop == "random",
    }
    description = f"decoding images at {config.resolution} px"
    return _map_once(images, _prepare_row, arguments, f"complexity_dit/{key}", description, config)


def _prepare_row(
    row: dict[str, Any], index: int, *,
    column: str, roots: list[str], resolution: int, strict: bool, whole: bool,
) -> dict[str, Any]:  # fmt: skip
    image = row[column] or {"path": None, "bytes": None}
    if isinstance(image, bytes):  # a file name, which need not be text
        image = {"path": os.fsdecode(image), "bytes": None}
    path = image["path"] and as_text(image["path"])
    name = f"{one_line(path)} (row {index})" if path else f"the image of row {index}"
    data, pixels, reason, height = b"", b"", "", 0
    try:
        data = _file_bytes(image, roots)
        picture = whole_pixels(data, resolution) if whole else square_pixels(data, resolution)
        pixels, height = picture.tobytes(), picture.shape[1]
    except UserError as error:
        if strict:
            raise UserError(
                f"{name}: {error} (strict=true stops here; strict=false skips such images)"
            ) from error
        reason = str(error)
    sha256 = hashlib.sha256(data).hexdigest()
    prepared = {"pixels": pixels, "sha256": sha256, "name": name, "reason": reason}
    return prepared | ({"height": height} if whole else {})


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
    if not joint:
        return file_bytes(Path(holder))
    try:
        files, path = url_to_fs(image["path"])
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
