"""Latents that `complexity-dit encode` cached, as a training set, mapped and split by file hash.

A cache is a folder with

    plan.json               what is encoded by which VAE; written first
    parts/part-00000.arrow  pictures in the order of the source (an Arrow stream of `datasets`)
    cache.json              the plan, the parts and per-channel statistics; written last

so a folder without `cache.json` is half-written. A row has the file's `sha256` and `name`, one
`label_<field>` each, and `latents`: the posterior mean of the picture and of its mirror image, with
`latents_std` beside it where the VAE has one.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from complexity_dit.config import DataConfig
from complexity_dit.data.dataset import PaintingDataset, in_split, load_data
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.vae import Vae, load_vae
from inl_core.run.errors import UserError
from inl_core.run.json_files import filled, fits, read_json_object

# The Arrow files of a cache of latents: where they are, and that they hold what the cache says.

PARTS = "parts"


def number_of_parts(plan: dict[str, Any]) -> int:
    """How many parts a cache has when it is whole."""
    return -(-plan["images"] // plan["part_size"])


def part_path(folder: Path, part: int) -> Path:
    """The file of one part."""
    return folder / PARTS / f"part-{part:05d}.arrow"


def open_parts(folder: Path, info: dict[str, Any]) -> datasets.Dataset:
    """Map the parts of a cache.

    Args:
        folder: Of the cache.
        info: What its `cache.json` says, checked as such.

    Raises:
        UserError: A part is absent or damaged, or its columns are not those that the cache says.
    """
    parts = []
    for number in range(number_of_parts(info)):
        path = part_path(folder, number)
        expected = min(info["part_size"], info["images"] - number * info["part_size"])
        found, said = 0, "it is not there"
        if path.is_file():
            try:
                parts.append(datasets.Dataset.from_file(str(path)))
                found, said = len(parts[-1]), f"it holds {len(parts[-1])}"
            except (OSError, pa.ArrowException) as error:
                said = f"it cannot be read ({error})"
        if found != expected:
            raise UserError(
                f"{path} should hold {expected} of the {info['images']} pictures that were "
                f"encoded, and {said}: remove {folder / 'cache.json'} and the file, and run the "
                "same encode command again"
            )
        if wrong := _wrong_column(parts[-1].data.table, info):
            raise UserError(
                f"{path} is not of the cache that {folder / 'cache.json'} describes: {wrong}; "
                "encode into a new folder"
            )
    return datasets.concatenate_datasets(parts)


def _wrong_column(table: pa.Table, info: dict[str, Any]) -> str | None:
    """What a column lacks that is read later; None if all are as the cache says."""
    numbers = math.prod(info["shape"]) * (2 if info["mirrored"] else 1)

    def is_latents(kind: pa.DataType) -> bool:
        return (
            pa.types.is_fixed_size_list(kind)
            and kind.list_size == numbers
            and kind.value_type == pa.float16()
        )

    latents = f"lists of {numbers} float16 numbers"
    wanted: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        "sha256": (pa.types.is_string, "text"),
        "name": (pa.types.is_string, "text"),
        "latents": (is_latents, latents),
    }
    if info["has_std"]:
        wanted["latents_std"] = (is_latents, latents)
    wanted |= {f"label_{f}": (pa.types.is_integer, "numbers") for f in info["label_names"]}
    for name, (is_right, kind) in wanted.items():
        if table.column_names.count(name) != 1:
            return f"no column {name!r}"
        column = table.column(name)
        if not is_right(column.type) or column.null_count:
            return f"column {name!r} holds no {kind}"
    for field, names in info["label_names"].items():
        ends = pc.min_max(table.column(f"label_{field}")).as_py()
        if ends["min"] < -1 or ends["max"] >= len(names):
            return f"label_{field} is outside of -1 to {len(names) - 1}"
    return None


FORMAT = "complexity-dit-latents-1"
PLAN_FILE, CACHE_FILE = "plan.json", "cache.json"
SCHEME = "latents:"

_PLANNED = ("images", "part_size")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentSpace:
    """What turns the network's numbers into pictures: z = x * std + mean, then the VAE's decoder.

    Attributes:
        vae: The VAE of the cache, checked against its hash.
        mean: Mean of each channel over the training latents.
        std: Standard deviation of each channel, likewise.
        data: The `DataConfig` of the pictures that were encoded, as a dict.
    """

    vae: Vae
    mean: list[float]
    std: list[float]
    data: dict[str, Any]


class LatentDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One split of a cache; the counterpart of `PaintingDataset`. Made by `load_training_data`.

    Attributes:
        label_names: Names in id order by field.
        labels: Ids, int64 of shape (N, F), -1 where missing; fields in the order of label_names.
        resolution: Side of the encoded pictures in pixels.
        channels: Channels of a latent.
        sample_size: Side of a latent in cells.
        samples_posterior: Whether the cache has standard deviations.
        mean: Per-channel mean of the training latents, float32 (channels,).
        std: Per-channel standard deviation, likewise.
        fingerprint: sha256 over the source, the VAE, the split and the labels.
        skipped: Images of the source that could not be encoded.
    """

    def __init__(self, folder: Path, info: dict[str, Any], config: DataConfig, split: str) -> None:
        """Map a cache whose `cache.json` was read by `read_cache`."""
        self.resolution, self.skipped = info["resolution"], info["skipped"]
        self.channels, self.sample_size, _ = info["shape"]
        self.samples_posterior = info["has_std"]
        self.mean = torch.tensor(info["statistics"]["mean"], dtype=torch.float32)
        self.std = torch.tensor(info["statistics"]["std"], dtype=torch.float32)
        self._folder, self._sides = folder, 2 if info["mirrored"] else 1
        self._rows = open_parts(folder, info)
        self._views: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}

        hashes = self._rows.data.column("sha256").to_pylist()
        kept = [i for i, sha in enumerate(hashes) if in_split(sha, config.holdout, split)]
        if not kept:
            raise UserError(
                f"split {split!r} of {folder} is empty: holdout={config.holdout} of "
                f"{len(hashes)} images leaves none"
            )
        self._kept = np.asarray(kept)
        self.label_names = _chosen_labels(info["label_names"], config.label_fields, folder)
        columns = [
            self._rows.data.column(f"label_{field}").to_numpy()[self._kept]
            for field in self.label_names
        ]
        table = np.stack(columns, axis=1) if columns else np.empty((len(kept), 0), np.int64)
        self.labels = torch.from_numpy(table.astype(np.int64))
        head = [FORMAT, info["source_fingerprint"], info["vae"]["sha256"], split, config.holdout]
        self.fingerprint = hashlib.sha256(
            json.dumps([*head, self.label_names, self.mean.tolist()]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``latents`` (float32, C × Y × X, normalised) and ``labels`` (int64, F)."""
        latents = self.clean([index], torch.zeros(1, dtype=torch.bool))[0]
        return {"latents": latents, "labels": self.labels[index]}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the views out: a worker process maps the files itself instead of copying them."""
        return self.__dict__ | {"_views": {}}

    def clean(
        self,
        indices: Sequence[int] | Tensor,
        flips: Tensor,
        posterior_noise: Tensor | None = None,
    ) -> Tensor:
        """Return the latents at ``indices`` as the network learns them.

        Args:
            indices: Which pictures, n of them.
            flips: bool (n,): of which of them the mirror image's latent is wanted.
            posterior_noise: Standard normal, of the result's shape: the latent is then drawn from
                the posterior, mean + std * noise; None gives the mean.

        Returns:
            float32 (n, channels, sample_size, sample_size), each channel with mean 0 and standard
            deviation 1 over the training set.

        Raises:
            UserError: A latent is not finite, or mirror images are wanted and were not encoded.
        """
        rows = self._kept[np.asarray(indices)]
        sides = flips.long().numpy()
        if self._sides == 1 and sides.any():
            raise UserError(f"{self._folder} has no mirrored latents; train with --data.flip false")
        latents = self._read("latents", rows, sides)
        if posterior_noise is not None:
            latents = latents + self._read("latents_std", rows, sides) * posterior_noise
        # A sum shows it in one pass; sums of float16 numbers are far from overflowing.
        if not latents.sum().isfinite():
            bad = rows[~latents.isfinite().flatten(1).all(1).numpy()]
            name = self._rows[int(bad[0])]["name"]
            raise UserError(
                f"the latent of {name} (row {bad[0]} of {self._folder}) is not finite: the cache "
                "is damaged; encode into a new folder"
            )
        return latents.sub_(self.mean.view(-1, 1, 1)).div_(self.std.view(-1, 1, 1))

    def warn_of_lost_pictures(self, source: str) -> None:
        """Say which encoded files are no longer in a folder that is still there.

        Training does without them; an evaluation against that folder would measure something else.
        """
        scheme, _, root = source.partition(":")
        if scheme != "imagefolder" or not Path(root).expanduser().is_dir():
            return
        # A name is "PATH (row N)"; a member of an archive has a URL in place of the path.
        names = (name.rsplit(" (row ", 1)[0] for name in self._rows.data.column("name").to_pylist())
        lost = [name for name in names if "://" not in name and not Path(name).exists()]
        if lost:
            log.warning(
                "%d of the %d pictures that were encoded into %s are no longer in %s (%s): "
                "training has their latents, but an evaluation cannot see them",
                len(lost), len(self._rows), self._folder, source, lost[0],
            )  # fmt: skip

    def _read(self, column: str, rows: np.ndarray, sides: np.ndarray) -> Tensor:
        if column not in self._views:
            self._views[column] = self._map(column)
        starts, views = self._views[column]
        where = np.searchsorted(starts, rows, side="right") - 1
        chosen = zip(where, rows, sides, strict=True)
        return torch.from_numpy(
            np.stack([views[w][r - starts[w], s] for w, r, s in chosen])
        ).float()

    def _map(self, column: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """The first row of each chunk, and views (rows, sides, C, Y, X) straight onto the files."""
        shape = (-1, self._sides, self.channels, self.sample_size, self.sample_size)
        views = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(shape)
            for chunk in self._rows.data.column(column).chunks
        ]
        return np.cumsum([0, *(len(view) for view in views[:-1])]), views


TrainingData = PaintingDataset | LatentDataset


def load_training_data(config: DataConfig, split: str = "train") -> TrainingData:
    """Pictures as `load_data` reads them, or, for `latents:PATH`, what `encode` made of them.

    Raises:
        UserError: As `load_data`; and the cache is absent, half-written or damaged, or its
            resolution, hold-out or mirror images are not those of the config.
    """
    if not config.source.startswith(SCHEME):
        if config.vae is not None:
            raise UserError(
                f"data.vae {config.vae!r} goes with source latents:PATH; {config.source} is "
                "trained on as pixels: encode it first (complexity-dit encode)"
            )
        return load_data(config, split)
    folder = folder_of(config)
    info = read_cache(folder)
    for key, ours, theirs in (
        ("resolution", config.resolution, info["resolution"]),
        ("holdout", config.holdout, info["statistics"]["holdout"]),
    ):
        if ours != theirs:
            again = "; encode again with another --holdout takes the statistics anew, in seconds"
            raise UserError(
                f"data.{key} is {ours}, and {folder} was made with {theirs}: set data.{key} to it"
                + (again if key == "holdout" else "")
            )
    if config.flip and not info["mirrored"]:
        raise UserError(
            f"data.flip is true, and {folder} has no mirrored latents: set it false, or encode "
            "again with --flip true"
        )
    dataset = LatentDataset(folder, info, config, split)
    dataset.warn_of_lost_pictures(DataConfig(**info["source"]).source)
    return dataset


def open_latent_space(config: DataConfig) -> LatentSpace | None:
    """The VAE and statistics that go with a training set; None for pixels.

    The VAE is `config.vae`, or the one that the cache names.

    Raises:
        UserError: If the VAE cannot be loaded, or is not the one that made the latents.
    """
    if not config.source.startswith(SCHEME):
        return None
    folder = folder_of(config)
    info = read_cache(folder)
    recorded = info["vae"]
    name = config.vae or recorded["name"]
    try:
        vae = load_vae(name)
    except UserError as error:
        raise UserError(
            f"{error} ({folder} was made with the VAE {recorded['name']}; data.vae says where it "
            "is now)"
        ) from error
    sha256 = weights_sha256(vae)
    if sha256 != recorded["sha256"]:
        raise UserError(
            f"the VAE {name} ({type(vae).__name__}, weights {sha256[:16]}) did not make the "
            f"latents of {folder}: those are from {recorded['name']} ({recorded['class']}, weights "
            f"{recorded['sha256'][:16]}); set data.vae to that one, or encode again"
        )
    statistics = info["statistics"]
    return LatentSpace(vae, statistics["mean"], statistics["std"], asdict(source_config(config)))


def source_config(config: DataConfig) -> DataConfig:
    """How the pictures behind a training set are read: the config itself unless it is latents."""
    if not config.source.startswith(SCHEME):
        return config
    info = read_cache(folder_of(config))
    encoded = DataConfig(**info["source"])
    return replace(
        encoded, vae=None, holdout=config.holdout, flip=config.flip,
        label_fields=list(_chosen_labels(info["label_names"], config.label_fields, config.source)),
    )  # fmt: skip


def read_cache(folder: Path) -> dict[str, Any]:
    """Read `cache.json`.

    Raises:
        UserError: There is no cache, it is half-written, or of another format.
    """
    try:
        info = read_json_object(folder / CACHE_FILE)
    except FileNotFoundError as error:
        if not (folder / PLAN_FILE).is_file():
            raise UserError(
                f"{folder} is no folder of latents (no {CACHE_FILE} in it); make one with "
                f"complexity-dit encode --source SOURCE --vae ID_OR_PATH --out {folder}"
            ) from error
        parts = len(list((folder / PARTS).glob("part-*.arrow")))
        raise UserError(
            f"{folder} is half-written: {parts} of {_planned_parts(folder)} parts are there; run "
            "the same encode command again, and it goes on"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CACHE_FILE}: {error}") from error
    if info.get("format") != FORMAT:
        raise UserError(
            f"{folder} has the format {info.get('format')!r}, expected {FORMAT}: encode again"
        )
    try:
        _check_info(info)
    except ValueError as error:
        raise UserError(
            f"{folder / CACHE_FILE} is damaged ({error}): encode into a new folder"
        ) from error
    return info


def _check_info(info: dict[str, Any]) -> None:
    """Every entry that is read later is there, of its type and in its range, or ValueError."""
    kinds: dict[str, Any] = {
        "images": int, "part_size": int, "resolution": int, "skipped": int, "shape": list[int],
        "has_std": bool, "mirrored": bool, "source_fingerprint": str, "source": dict[str, Any],
        "label_names": dict[str, list[str]], "vae": dict[str, Any], "statistics": dict[str, Any],
    }  # fmt: skip
    statistics = {"mean": list[float], "std": list[float], "holdout": float}
    for where, wanted in ((info, kinds), (info.get("statistics"), statistics)):
        for name, kind in wanted.items():
            if not isinstance(where, dict) or not fits(where.get(name), kind):
                raise ValueError(f"{name} is no {getattr(kind, '__name__', kind)}")
    if not all(fits(info["vae"].get(name), str) for name in ("name", "class", "sha256")):
        raise ValueError("vae lacks its name, class or sha256")
    if len(info["shape"]) != 3 or info["shape"][1] != info["shape"][2]:
        raise ValueError(f"shape {info['shape']} is not (channels, side, side)")
    if min(*info["shape"], info["images"], info["part_size"], info["resolution"]) < 1:
        raise ValueError("a size is below 1")
    mean, std = info["statistics"]["mean"], info["statistics"]["std"]
    if not len(mean) == len(std) == info["shape"][0] or min(std) <= 0:
        raise ValueError("mean and std are not one number a channel, std above 0")
    filled(DataConfig, info["source"])


def _planned_parts(folder: Path) -> int:
    try:
        plan = read_json_object(folder / PLAN_FILE)
        if not all(fits(plan.get(name), int) and plan[name] > 0 for name in _PLANNED):
            raise ValueError(f"no number above 0 under {' and '.join(_PLANNED)}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {folder / PLAN_FILE}: {error}; encode into a new folder"
        ) from error
    return number_of_parts(plan)


def folder_of(config: DataConfig) -> Path:
    """The folder of a source `latents:PATH`."""
    return Path(config.source.removeprefix(SCHEME)).expanduser()


def _chosen_labels(
    label_names: dict[str, list[str]], fields: Sequence[str] | None, where: object
) -> dict[str, list[str]]:
    if fields is None:
        return label_names
    for field in fields:
        if field not in label_names:
            raise UserError(
                f"label field {field!r} is not in {where}; its fields are "
                f"{', '.join(label_names) or 'none'}"
            )
    return {field: label_names[field] for field in fields}
