"""Square pictures with label ids, split by the hash of each file's bytes.

A source is read once through `datasets`: one cached `map` decodes, crops and hashes every image, so
a second load only maps the cache file. Pillow decodes here, not `datasets`, so that a broken file
can be named.
"""

import hashlib
import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from complexity_dit.config import DataConfig
from complexity_dit.data.captions import Captions, column_kinds, known_rows, text_columns
from complexity_dit.data.sources import read_rows
from complexity_dit.labels import MISSING
from complexity_dit.pictures import VERSION
from inl_core.run.errors import UserError

MIN_IMAGES_PER_NAME = 2
"""A text column counts as categorical when its names repeat at least this often on average."""

SPLITS = ("train", "heldout", "all")

RAM_LIMIT = 2 * 2**30
"""Bytes of pixels up to which a split is copied into memory; a larger one stays memory-mapped."""

_ENDING = re.compile(r"\.(\w+) \(row \d+\)$")  # of a file, in the name of a row
_JPEG_ENDINGS = frozenset({"jpg", "jpeg", "jpe", "jfif"})
_MAX_LOGGED = 20  # skipped images

log = logging.getLogger(__name__)


class PaintingDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One split of a source: square uint8 pictures with label ids. Made by `load_data`.

    Attributes:
        label_names: Names in id order by field, over all splits, so that ids agree between them.
        labels: Ids, int64 of shape (N, F), -1 where missing; fields in the order of label_names.
        resolution: Side of the pictures in pixels.
        channels: Channels of the network's input, 3.
        sample_size: Side of the network's input in its own cells, here pixels.
        samples_posterior: Whether `clean` takes noise, which only latents do.
        on_device: Whether `clean` reads the memory of an accelerator, likewise.
        fingerprint: sha256 over the sorted file hashes with their labels, the label names, the
            resolution, the split and the version of the preprocessing.
        skipped: Number of images of this split that could not be used.
        jpegs: Fraction of the pictures whose file name is that of a JPEG; None without files.
        kinds: Columns that captions can be made of, see `column_kinds`.
        captions: The captions of the pictures, if they were asked for.
    """

    captions: Captions | None = None

    channels = 3
    samples_posterior = False
    on_device = False

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: datasets.Dataset,
        kept: Sequence[int],
        labels: Tensor,
        label_names: dict[str, list[str]],
        resolution: int,
        split: str,
        skipped: int,
    ) -> None:
        """Take the prepared rows and the columns of a source, and the indices of the split."""
        self.label_names = label_names
        self.resolution = self.sample_size = resolution
        self.skipped = skipped
        self._rows, self._columns = rows, columns
        self.kinds = column_kinds(columns)
        self._kept = torch.as_tensor(kept, dtype=torch.int64)
        self.labels = labels[self._kept]
        names = self._rows.data.column("name").take(self._kept.numpy()).to_pylist()
        endings = [found[1].lower() for name in names if (found := _ENDING.search(name))]
        self.jpegs = sum(e in _JPEG_ENDINGS for e in endings) / len(endings) if endings else None
        is_whole = "height" in rows.column_names
        self._heights = rows.data.column("height").to_numpy() if is_whole else None
        self.fingerprint = self._fingerprint(split)
        self._pixels: Tensor | None = None
        if not is_whole and len(kept) * 3 * resolution**2 <= RAM_LIMIT:
            self._pixels = self._gather(self._kept)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `pixel_values` (uint8, 3 × H × W, RGB) and `labels` (int64, F)."""
        return {"pixel_values": self.pixels([index])[0], "labels": self.labels[index]}

    def pixels(self, indices: Sequence[int] | Tensor, shifts: Tensor | None = None) -> Tensor:
        """Return the pictures at `indices` as one uint8 tensor (n, 3, H, W).

        Args:
            indices: Which pictures, n of them.
            shifts: float (n,) in [0, 1): where the square lies between the ends of the longer side;
                None is the middle. Squares that were cut when the source was read do not move.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if self._pixels is not None:
            return self._pixels[chosen]
        return self._gather(self._kept[chosen], shifts)

    def sha256(self, index: int) -> str:
        """Return the sha256 of a picture's file."""
        return self._rows.data.column("sha256")[int(self._kept[index])].as_py()

    def name(self, index: int) -> str:
        """Return where a picture comes from, for messages."""
        return self._rows.data.column("name")[int(self._kept[index])].as_py()

    def known(self, indices: Sequence[int] | None = None) -> list[str]:
        """Return what is known about pictures, or all of them, see `known_rows`."""
        kept = self._kept if indices is None else self._kept[list(indices)]
        return known_rows(self._columns, kept.tolist())

    def clean(
        self,
        indices: Sequence[int] | Tensor,
        flips: Tensor,
        posterior_noise: Tensor | None = None,
        shifts: Tensor | None = None,
    ) -> Tensor:
        """Return the pictures at `indices` as training targets.

        Args:
            indices: Which pictures, n of them.
            flips: bool (n,): which of them to mirror left to right.
            posterior_noise: Ignored; only latents have a posterior.
            shifts: float (n,) in [0, 1): the place of a random crop, as in `pixels`.

        Returns:
            float32 (n, channels, sample_size, sample_size), here pixels in [-1, 1].
        """
        pixels = self.pixels(indices, shifts).float() / 127.5 - 1
        return torch.where(flips[:, None, None, None], F.horizontal_flip(pixels), pixels)

    def _gather(self, positions: Tensor, shifts: Tensor | None = None) -> Tensor:
        column, side = self._rows.data.column("pixels"), self.resolution
        places = [0.5] * len(positions) if shifts is None else shifts.tolist()
        out = np.empty((len(positions), 3, side, side), dtype=np.uint8)
        for square, position, place in zip(out, positions.tolist(), places, strict=True):
            height = side if self._heights is None else self._heights[position]
            picture = np.frombuffer(column[position].as_buffer(), np.uint8).reshape(3, height, -1)
            top, left = (int(place * (length - side + 1)) for length in picture.shape[1:])
            square[:] = picture[:, top : top + side, left : left + side]
        return torch.from_numpy(out)

    def _fingerprint(self, split: str) -> str:
        files = self._rows.data.column("sha256").take(self._kept.numpy()).to_pylist()
        lines = sorted(
            f"{file} {ids}" for file, ids in zip(files, self.labels.tolist(), strict=True)
        )
        head = f"{VERSION} {split} {self.resolution} {self.label_names}"
        return hashlib.sha256("\n".join([head, *lines]).encode()).hexdigest()


def load_data(config: DataConfig, split: str, captions: bool = False) -> PaintingDataset:
    """Read a source and return one split of it.

    A file is held out when the first 64 bits of its bytes' sha256, as a fraction of 2⁶⁴, are
    below `config.holdout`. For `art` the "file" is the RGB bytes of the picture drawn at 32 px,
    whatever the training resolution, so the split does not change with the resolution. The splits
    that a folder or a hub dataset comes with are joined first.

    Images are prepared by `square_pixels`. One that cannot be used (unreadable, missing, smaller
    than the resolution, over Pillow's limit of 89 megapixels) is named in a warning, skipped and
    counted, or stops the run with `config.strict`.

    Args:
        config: What to read.
        split: "train", "heldout" or "all".
        captions: Whether they are needed too; columns of captions are then no labels by default.

    Raises:
        UserError: The source, the labels, the captions or a setting cannot be used, or the split is
            empty.
    """
    _check(config, split)
    started = time.perf_counter()
    rows, columns, left_out = read_rows(config)
    texts = text_columns(column_kinds(columns), config) if captions else []
    label_names, labels = read_labels(columns, config.label_fields, but=texts)

    names, reasons, hashes = (
        rows.data.column(name).to_pylist() for name in ("name", "reason", "sha256")
    )
    bad = [f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True) if reason]
    if len(bad) == len(rows):
        raise UserError(f"none of the {len(rows)} images of {config.source} can be used; {bad[0]}")
    if bad and config.strict:
        raise UserError(f"{bad[0]} (strict=true stops here; strict=false skips such images)")
    members = [i for i, sha256 in enumerate(hashes) if in_split(sha256, config.holdout, split)]
    kept = [i for i in members if not reasons[i]]
    if not kept:
        raise UserError(
            f"split {split!r} of {config.source} is empty: holdout={config.holdout} of "
            f"{len(rows) - len(bad)} usable images leaves none; change holdout or add images"
        )
    skipped = [f"{names[i]}: {reasons[i]}" for i in members if reasons[i]]
    for line in skipped[:_MAX_LOGGED]:
        log.warning("skipped %s", line)
    if skipped:
        log.warning("skipped %d of the %d images of %r", len(skipped), len(members), split)
        left_out = [f"{len(skipped)} that cannot be used", *left_out]
    dataset = PaintingDataset(
        rows, columns, kept, labels, label_names, config.resolution, split, len(skipped)
    )
    if captions:
        dataset.captions = Captions(dataset.known(), dataset.kinds, config)
    fields = ", ".join(f"{field} ({len(n)})" for field, n in label_names.items()) or "no labels"
    seconds = time.perf_counter() - started
    missing = f" (left out: {', '.join(left_out)})" if left_out else ""
    log.info(
        "%s %s: %d images%s, %s, %.1f s",
        config.source, split, len(dataset), missing, fields, seconds,
    )  # fmt: skip
    return dataset


def in_split(sha256: str, holdout: float, split: str) -> bool:
    """Return whether the file with this sha256 belongs to a split."""
    heldout = int(sha256[:16], 16) / 2**64 < holdout
    return split == "all" or heldout == (split == "heldout")


def _check(config: DataConfig, split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"split {split!r} must be one of {', '.join(SPLITS)}")
    scheme, _, rest = config.source.partition(":")
    if config.source != "art" and (scheme not in ("imagefolder", "hub") or not rest):
        raise UserError(
            f"source {config.source!r} must be art, imagefolder:PATH or hub:NAME "
            "(for example hub:huggan/wikiart); latents:PATH is for training only"
        )


def read_labels(
    rows: datasets.Dataset, fields: Sequence[str] | None, but: Sequence[str] = ()
) -> tuple[dict[str, list[str]], Tensor]:
    """Convert the label columns of a dataset into names and ids.

    With `fields=None` the fields are, in column order, every `ClassLabel` column and every text
    column that is categorical: it has at least two different names, and the labelled rows are at
    least `MIN_IMAGES_PER_NAME` times as many as the names. So styles, genres and artists are labels
    and titles, captions and URLs are not. A column of numbers is a label only when it is named.
    Named fields are used as they are, in the order given.

    `ClassLabel` keeps its own names and order; the names of other columns are sorted (numbers by
    value). None, NaN, -1 in a `ClassLabel` and text that is empty after stripping are missing.

    Args:
        rows: All rows of the data, of every split, so that ids agree between splits.
        fields: Column names, an empty list for no labels, or None for the rule above.
        but: Columns that the rule leaves out.

    Returns:
        Names by field, and the ids, int64 of shape (rows, fields), with -1 where missing.

    Raises:
        UserError: A named field is absent, given twice, or cannot be a label.
    """
    if fields is None:
        chosen = [name for name in rows.column_names if name not in but]
        fields = [name for name in chosen if _is_categorical(rows, name)]
    for field in fields:
        if not field.strip() or not field.isprintable():
            raise UserError(
                f"the label field {field!r} has no printable name: rename that column, or choose "
                "others with --data.label_fields"
            )
    if len(set(fields)) != len(fields):
        raise UserError(f"label_fields {list(fields)} names a field twice; name each one once")
    label_names: dict[str, list[str]] = {}
    ids = torch.empty((len(rows), len(fields)), dtype=torch.int64)
    for i, field in enumerate(fields):
        if field not in rows.column_names:
            raise UserError(
                f"label field {field!r} is not in the data; its columns are "
                f"{', '.join(rows.column_names)}: choose among them with --data.label_fields, or "
                "set it to null for every column of names"
            )
        label_names[field], column = _names_and_ids(rows, field)
        ids[:, i] = torch.tensor(column, dtype=torch.int64)
    return label_names, ids


def _is_categorical(rows: datasets.Dataset, column: str) -> bool:
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return True
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        return False
    values = [value for value in _values(rows, column) if value is not None]
    count = len(set(values))
    return count >= 2 and len(values) >= MIN_IMAGES_PER_NAME * count


def _names_and_ids(rows: datasets.Dataset, field: str) -> tuple[list[str], list[int]]:
    feature = rows.features[field]
    values = _values(rows, field)
    if isinstance(feature, datasets.ClassLabel):
        ids = [MISSING if value is None or value < 0 else int(value) for value in values]
        return list(feature.names), ids
    present = [value for value in values if value is not None]
    if {type(value) for value in present} not in (set(), {str}, {int}, {bool}):
        raise UserError(
            f"label field {field!r} holds {feature}, which has no names; a label is a ClassLabel, "
            "text or whole numbers"
        )
    if not present:
        raise UserError(f"label field {field!r} is empty in every row; leave it out")
    names: list[Any] = sorted(set(present))
    positions = {value: i for i, value in enumerate(names)}
    return [str(name) for name in names], [positions.get(value, MISSING) for value in values]


def _values(rows: datasets.Dataset, column: str) -> list[Any]:
    """Return one column with every form of "missing" as None."""
    # The column alone, as Arrow: a row-wise read would load the images too.
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return [_normalised(value) for value in values]


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip() or None
    # A CSV column of whole numbers with gaps in it arrives as floats.
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value
