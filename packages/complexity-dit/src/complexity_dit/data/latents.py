"""Latents that `complexity-dit encode` cached, as a memory-mapped training set.

A cache is a folder with

    plan.json               what is encoded by which VAE; written first
    parts/part-00000.arrow  pictures in the order of the source (an Arrow stream of `datasets`)
    cache.json              the plan and per-channel statistics; written last

so a folder without `cache.json` is incomplete. A row has the file's `sha256` and `name`, one
`label_<field>` per field, and `latents`: the posterior means of the picture and of its mirror
image, with `latents_std` next to them where the VAE has a posterior. `known` has what captions can
be made of, as JSON; caches of version 0.2.0 have none.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Sequence
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
from complexity_dit.data.captions import Captions, sha256_of
from complexity_dit.data.dataset import PaintingDataset, in_split, load_data
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.vae import Vae, load_vae
from inl_core.run.errors import UserError
from inl_core.run.json_files import filled, fits, read_json_object

DEVICE_SHARE = 0.5
"""Largest share of a device's free memory, after the state of a training, that its latents take."""

FORMAT = "complexity-dit-latents-1"
PLAN_FILE, CACHE_FILE = "plan.json", "cache.json"
SCHEME = "latents:"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentSpace:
    """The map from network outputs x to pictures: z = x * std + mean, then the VAE's decoder.

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
        skipped: Number of images of the source that could not be encoded.
        on_device: Whether `clean` reads the memory of an accelerator, see `copied_to`.
        kinds: Columns that captions can be made of.
        captions: The captions of the pictures, if they were asked for.
    """

    captions: Captions | None = None

    def __init__(
        self,
        folder: Path,
        info: dict[str, Any],
        config: DataConfig,
        split: str,
        captions: bool = False,
    ) -> None:
        """Map a cache whose `cache.json` was read by `read_cache`."""
        self.resolution, self.skipped = info["resolution"], info["skipped"]
        self.channels, self.sample_size, _ = info["shape"]
        self.samples_posterior = info["has_std"]
        self.mean = torch.tensor(info["statistics"]["mean"], dtype=torch.float32)
        self.std = torch.tensor(info["statistics"]["std"], dtype=torch.float32)
        self._folder, self._sides = folder, 2 if info["mirrored"] else 1
        self._rows = _open_parts(folder, info)
        self._views: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}
        self._copies: dict[str, Tensor] = {}

        hashes = self._rows.data.column("sha256").to_pylist()
        kept = [i for i, sha256 in enumerate(hashes) if in_split(sha256, config.holdout, split)]
        if not kept:
            raise UserError(
                f"split {split!r} of {folder} is empty: holdout={config.holdout} of "
                f"{len(hashes)} images leaves none"
            )
        self._kept = np.asarray(kept)
        self.kinds = info.get("known", {}).get("columns", {})
        label_names = info["label_names"]
        if captions:
            if "known" not in info:
                raise UserError(
                    f"{folder} was encoded without captions, by an earlier version: encode into a "
                    "new folder"
                )
            known = self._rows.data.column("known").to_pylist()
            if sha256_of(known) != info["known"]["sha256"]:
                raise UserError(f"the captions in {folder} are damaged: encode into a new folder")
            self.captions = Captions([known[i] for i in kept], self.kinds, config)
            if config.label_fields is None:
                texts = self.captions.columns
                label_names = {f: names for f, names in label_names.items() if f not in texts}
        self.label_names = _chosen_labels(label_names, config.label_fields, folder)
        labels = np.empty((len(kept), len(self.label_names)), np.int64)
        for i, field in enumerate(self.label_names):
            labels[:, i] = self._rows.data.column(f"label_{field}").to_numpy()[self._kept]
        self.labels = torch.from_numpy(labels)
        head = [FORMAT, info["source_fingerprint"], info["vae"]["sha256"], split, config.holdout]
        self.fingerprint = hashlib.sha256(
            json.dumps([*head, self.label_names, self.mean.tolist()]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `latents` (float32, C × Y × X, normalised) and `labels` (int64, F)."""
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
        shifts: Tensor | None = None,
    ) -> Tensor:
        """Return the latents at `indices` as training targets.

        Args:
            indices: Which pictures, n of them.
            flips: bool (n,): where to use the latent of the mirror image.
            posterior_noise: Standard normal, of the result's shape: the latent is then drawn from
                the posterior, mean + std * noise; None gives the mean.
            shifts: Ignored; the pictures were cut before they were encoded.

        Returns:
            float32 (n, channels, sample_size, sample_size), each channel with mean 0 and standard
            deviation 1 over the training set.

        Raises:
            UserError: A latent is not finite, or mirror images are wanted and were not encoded.
        """
        if self.on_device:
            return self._clean_copies(indices, flips, posterior_noise)
        rows = self._kept[np.asarray(indices)]
        sides = flips.long().numpy()
        if self._sides == 1 and sides.any():
            raise UserError(f"{self._folder} has no mirrored latents; train with --data.flip false")
        latents = self._read("latents", rows, sides).float()
        if posterior_noise is not None:
            latents = latents + self._read("latents_std", rows, sides).float() * posterior_noise
        self._check_finite(latents, rows)
        return latents.sub_(self.mean.view(-1, 1, 1)).div_(self.std.view(-1, 1, 1))

    @property
    def on_device(self) -> bool:
        """Whether `clean` reads the memory of an accelerator, see `copied_to`."""
        return bool(self._copies)

    def copied_to(self, device: torch.device) -> "LatentDataset":
        """Return this split with its latents, in float16, in the memory of a device.

        `clean` of the result returns the same bits there, and is best given tensors of the device,
        as it then does not wait for it. Every latent is checked here, and none in `clean`.

        Raises:
            UserError: A latent is not finite.
        """
        twin, cell = copy.copy(self), (self.channels, self.sample_size, self.sample_size)
        twin._copies = {name: getattr(self, name).to(device) for name in ("mean", "std")}
        for column in self._columns:
            whole = torch.empty((len(self), self._sides, *cell), dtype=torch.float16, device=device)
            for start in range(0, len(self), 1024):
                rows = self._kept[start : start + 1024]
                part = self._read(column, rows, [slice(None)] * len(rows))
                self._check_finite(part.float(), rows)
                whole[start : start + len(part)] = part.to(device)
            twin._copies[column] = whole
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of the latents of this split."""
        cells = self.channels * self.sample_size**2
        return 2 * len(self) * self._sides * cells * len(self._columns)

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("latents", "latents_std") if self.samples_posterior else ("latents",)

    def _clean_copies(
        self, indices: Sequence[int] | Tensor, flips: Tensor, posterior_noise: Tensor | None
    ) -> Tensor:
        copies, which = self._copies, (torch.as_tensor(indices), flips.long())
        latents = copies["latents"][which].float()
        if posterior_noise is not None:
            latents = latents + copies["latents_std"][which].float() * posterior_noise
        return latents.sub_(copies["mean"].view(-1, 1, 1)).div_(copies["std"].view(-1, 1, 1))

    def _check_finite(self, latents: Tensor, rows: np.ndarray) -> None:
        # The sum shows it in one pass; sums of float16 numbers are far from overflowing.
        if not latents.sum().isfinite():
            bad = rows[~latents.isfinite().flatten(1).all(1).numpy()]
            name = self._rows[int(bad[0])]["name"]
            raise UserError(
                f"the latent of {name} (row {bad[0]} of {self._folder}) is not finite: the cache "
                "is damaged; encode into a new folder"
            )

    def warn_of_removed_pictures(self, source: str) -> None:
        """Warn when files that were encoded are no longer in a folder that still exists.

        Training does not need them, but an evaluation against that folder would not have them.
        """
        scheme, _, root = source.partition(":")
        if scheme != "imagefolder" or not Path(root).expanduser().is_dir():
            return
        # A name is "PATH (row N)"; a member of an archive has a URL in place of the path.
        names = (name.rsplit(" (row ", 1)[0] for name in self._rows.data.column("name").to_pylist())
        missing = [name for name in names if "://" not in name and not Path(name).exists()]
        if missing:
            log.warning(
                "%d of the %d pictures that were encoded into %s are no longer in %s (%s): "
                "training uses their latents, but an evaluation cannot read them",
                len(missing), len(self._rows), self._folder, source, missing[0],
            )  # fmt: skip

    def _read(self, column: str, rows: np.ndarray, sides: Sequence[Any] | np.ndarray) -> Tensor:
        """Return rows in float16: of each the picture, 0, its mirror image, 1, or a slice."""
        if column not in self._views:
            self._views[column] = self._map(column)
        starts, views = self._views[column]
        where = np.searchsorted(starts, rows, side="right") - 1
        chosen = zip(where, rows, sides, strict=True)
        return torch.from_numpy(np.stack([views[w][r - starts[w], s] for w, r, s in chosen]))

    def _map(self, column: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return each chunk's first row, and views (rows, sides, C, Y, X) onto the mapped files."""
        shape = (-1, self._sides, self.channels, self.sample_size, self.sample_size)
        views = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(shape)
            for chunk in self._rows.data.column(column).chunks
        ]
        return np.cumsum([0, *(len(view) for view in views[:-1])]), views


TrainingData = PaintingDataset | LatentDataset


def load_training_data(
    config: DataConfig, split: str = "train", captions: bool = False
) -> TrainingData:
    """Read pictures as `load_data` does, or, for `latents:PATH`, the latents that `encode` cached.

    Raises:
        UserError: As `load_data`; or the cache is absent, incomplete or damaged, or its resolution,
            hold-out or mirror images are not those of the config.
    """
    if not config.source.startswith(SCHEME):
        if config.vae is not None:
            raise UserError(
                f"data.vae {config.vae!r} goes with source latents:PATH; {config.source} is "
                "trained on as pixels: encode it first (complexity-dit encode)"
            )
        return load_data(config, split, captions)
    folder = folder_of(config)
    info = read_cache(folder)
    if config.resolution != info["resolution"]:
        raise UserError(
            f"data.resolution is {config.resolution}, and {folder} was made with "
            f"{info['resolution']}: set data.resolution to it"
        )
    holdout = info["statistics"]["holdout"]
    if config.holdout != holdout:
        raise UserError(
            f"data.holdout is {config.holdout}, and {folder} was made with {holdout}: set "
            "data.holdout to it, or encode again with another --holdout, which only recomputes "
            "the statistics"
        )
    check_crop(config)
    if config.flip and not info["mirrored"]:
        raise UserError(
            f"data.flip is true, and {folder} has no mirrored latents: set it false, or encode "
            "again with --flip true"
        )
    dataset = LatentDataset(folder, info, config, split, captions)
    dataset.warn_of_removed_pictures(filled(DataConfig, info["source"]).source)
    return dataset


def on_training_device(data: TrainingData, device: torch.device) -> TrainingData:
    """Return a training set with its latents on the accelerator that trains, if they fit there.

    They do if they take at most `DEVICE_SHARE` of the memory that is free when this is called.
    Pictures, and latents that are too large, stay where they are, and so do those of a CPU.
    """
    if device.type == "cpu" or not isinstance(data, LatentDataset):
        return data
    free, _ = getattr(torch, device.type).mem_get_info(device)
    small = data.nbytes <= DEVICE_SHARE * free
    log.info(
        "the latents take %.3g GiB and %s has %.3g GiB free: they are %s",
        data.nbytes / 2**30, device, free / 2**30, "kept there" if small else "copied by batches",
    )  # fmt: skip
    return data.copied_to(device) if small else data


def check_crop(config: DataConfig) -> None:
    """Raise a `UserError` for a crop that latents cannot have."""
    if config.crop != "center":
        raise UserError(
            f"data.crop is {config.crop}, and latents are encoded once, of the square in the "
            "middle: set it to center, or train on pixels"
        )


def open_latent_space(config: DataConfig) -> LatentSpace | None:
    """Load the VAE and statistics that belong to a training set; None for pixels.

    The VAE is `config.vae`, or the one that the cache names.

    Raises:
        UserError: The VAE cannot be loaded, or is not the one that made the latents.
    """
    if not config.source.startswith(SCHEME):
        return None
    folder = folder_of(config)
    info = read_cache(folder)
    recorded, statistics = info["vae"], info["statistics"]
    name = config.vae or recorded["name"]
    try:
        vae = load_vae(name)
    except UserError as error:
        raise UserError(
            f"{error} ({folder} was made with the VAE {recorded['name']}; set data.vae to where it "
            "is now)"
        ) from error
    sha256 = weights_sha256(vae)
    if sha256 != recorded["sha256"]:
        raise UserError(
            f"the VAE {name} ({type(vae).__name__}, weights {sha256[:16]}) did not make the "
            f"latents of {folder}: those are from {recorded['name']} ({recorded['class']}, weights "
            f"{recorded['sha256'][:16]}); set data.vae to that one, or encode again"
        )
    return LatentSpace(vae, statistics["mean"], statistics["std"], asdict(source_config(config)))


def source_config(config: DataConfig) -> DataConfig:
    """Return how the pictures of a training set are read: for latents, how they were encoded."""
    if not config.source.startswith(SCHEME):
        return config
    info = read_cache(folder_of(config))
    return replace(
        filled(DataConfig, info["source"]), vae=None, holdout=config.holdout, flip=config.flip,
        text_column=config.text_column, caption_template=config.caption_template,
        label_fields=list(_chosen_labels(info["label_names"], config.label_fields, config.source)),
    )  # fmt: skip


def folder_of(config: DataConfig) -> Path:
    """Return the folder of a source `latents:PATH`."""
    return Path(config.source.removeprefix(SCHEME)).expanduser()


def _chosen_labels(
    label_names: dict[str, list[str]], fields: Sequence[str] | None, where: object
) -> dict[str, list[str]]:
    for field in fields or ():
        if field not in label_names:
            raise UserError(
                f"label field {field!r} is not in {where}; its fields are "
                f"{', '.join(label_names) or 'none'}"
            )
    return label_names if fields is None else {field: label_names[field] for field in fields}


# The files of a cache.


def number_of_parts(plan: dict[str, Any]) -> int:
    """Return how many parts a complete cache has."""
    return -(-plan["images"] // plan["part_size"])


def part_path(folder: Path, part: int) -> Path:
    """Return the file of one part."""
    return folder / "parts" / f"part-{part:05d}.arrow"


def part_schema(plan: dict[str, Any]) -> dict[str, pa.DataType]:
    """Return the columns of a part, in order, with their Arrow types."""
    text, sides = pa.string(), 2 if plan["mirrored"] else 1
    latent = pa.list_(pa.float16(), sides * math.prod(plan["shape"]))
    types = {"sha256": text, "name": text}
    types |= {f"label_{field}": pa.int64() for field in plan["label_names"]}
    types |= {"known": text} if "known" in plan else {}
    return types | dict.fromkeys(("latents", "latents_std")[: 1 + plan["has_std"]], latent)


def read_cache(folder: Path) -> dict[str, Any]:
    """Read and check `cache.json`.

    Raises:
        UserError: There is no cache, or it is incomplete, damaged or of another format.
    """
    try:
        info = read_json_object(folder / CACHE_FILE)
    except FileNotFoundError as error:
        if not (folder / PLAN_FILE).is_file():
            raise UserError(
                f"{folder} is not a folder of latents (no {CACHE_FILE} in it); make one with "
                f"complexity-dit encode --source SOURCE --vae ID_OR_PATH --out {folder}"
            ) from error
        written = len(list(part_path(folder, 0).parent.glob("part-*.arrow")))
        raise UserError(
            f"{folder} is incomplete: {written} of {_planned_parts(folder)} parts are written; run "
            "the same encode command again to continue"
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
    """Raise ValueError unless every entry that is read later is there, of its type and range."""
    types: dict[str, Any] = {
        "images": int, "part_size": int, "resolution": int, "skipped": int, "shape": list[int],
        "has_std": bool, "mirrored": bool, "source_fingerprint": str, "source": dict[str, Any],
        "label_names": dict[str, list[str]], "vae": dict[str, Any], "statistics": dict[str, Any],
    }  # fmt: skip
    _check_types(info, types)
    if "known" in info:
        _check_types(info, {"known": dict[str, Any]})
        _check_types(info["known"], {"columns": dict[str, str], "sha256": str})
    _check_types(info["vae"], {"name": str, "class": str, "sha256": str})
    _check_types(info["statistics"], {"mean": list[float], "std": list[float], "holdout": float})
    if len(info["shape"]) != 3 or info["shape"][1] != info["shape"][2]:
        raise ValueError(f"shape {info['shape']} is not (channels, side, side)")
    if min(*info["shape"], info["images"], info["part_size"], info["resolution"]) < 1:
        raise ValueError("a size is below 1")
    if math.prod(info["shape"]) >= 2**30:
        raise ValueError(f"shape {info['shape']} is too large")
    mean, std = info["statistics"]["mean"], info["statistics"]["std"]
    if not len(mean) == len(std) == info["shape"][0] or min(std) <= 0:
        raise ValueError("mean and std are not one number per channel with std above 0")
    filled(DataConfig, info["source"])


def _check_types(values: dict[str, Any], types: dict[str, Any]) -> None:
    for name, kind in types.items():
        if not fits(values.get(name), kind):
            raise ValueError(f"{name} is not a {getattr(kind, '__name__', kind)}")


def _planned_parts(folder: Path) -> int:
    try:
        plan = read_json_object(folder / PLAN_FILE)
        _check_types(plan, {"images": int, "part_size": int})
        if min(plan["images"], plan["part_size"]) < 1:
            raise ValueError("images and part_size must be at least 1")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {folder / PLAN_FILE}: {error}; encode into a new folder"
        ) from error
    return number_of_parts(plan)


def _open_parts(folder: Path, info: dict[str, Any]) -> datasets.Dataset:
    """Map the parts of a cache, or raise UserError if they are not as its `cache.json` says."""
    parts = []
    for number in range(number_of_parts(info)):
        path = part_path(folder, number)
        expected = min(info["part_size"], info["images"] - number * info["part_size"])
        count, problem = 0, "it is not there"
        if path.is_file():
            try:
                parts.append(datasets.Dataset.from_file(str(path)))
                count, problem = len(parts[-1]), f"it holds {len(parts[-1])}"
            except (OSError, pa.ArrowException) as error:
                problem = f"it cannot be read ({error})"
        if count != expected:
            raise UserError(
                f"{path} should hold {expected} of the {info['images']} pictures that were "
                f"encoded, and {problem}: remove {folder / CACHE_FILE} and the file, and run the "
                "same encode command again"
            )
        if problem := _table_problem(parts[-1].data.table, info):
            raise UserError(
                f"{path} does not match {folder / CACHE_FILE}: {problem}; encode into a new folder"
            )
    return datasets.concatenate_datasets(parts)


def _table_problem(table: pa.Table, info: dict[str, Any]) -> str | None:
    """Return what is wrong with a column that is read later; None if all are as expected."""
    for name, expected in part_schema(info).items():
        types = [table.schema.types[i] for i in table.schema.get_all_field_indices(name)]
        if types != [expected] or table.column(name).null_count:
            actual = ", ".join(map(str, types)) or "absent"
            return f"column {name!r} is {actual}, expected {expected} without nulls"
    for field, names in info["label_names"].items():
        ends = pc.min_max(table.column(f"label_{field}")).as_py()
        if ends["min"] < -1 or ends["max"] >= len(names):
            return f"label_{field} is outside of -1 to {len(names) - 1}"
    return None
