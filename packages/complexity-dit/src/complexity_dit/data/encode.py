"""Encoding of pictures into cached latents, resumable and shared between processes.

Training then reads what the VAE would compute again in every epoch. Latents are stored in fp16: its
rounding is 60 dB below values of unit size, and a VAE reconstructs to about 30 dB.
"""

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter

from complexity_dit.config import DataConfig
from complexity_dit.data.captions import sha256_of
from complexity_dit.data.dataset import PaintingDataset, in_split, load_data
from complexity_dit.data.latents import (
    CACHE_FILE,
    FORMAT,
    PLAN_FILE,
    check_crop,
    number_of_parts,
    part_path,
    part_schema,
)
from complexity_dit.distributed import (
    all_agree,
    is_main,
    main_first,
    on_main,
    own_blocks,
    own_process_group,
    pick_device,
)
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.vae import Vae, load_vae, posterior, scale_factor
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, remove_partial_writes
from inl_core.run.folders import claim_folder, writing
from inl_core.run.json_files import read_json_object
from inl_core.run.progress import Progress
from inl_core.run.workers import report_dead_workers

logger = logging.getLogger(__name__)

LATENTS_KIND = "complexity-dit-latents"
"""Mark of a folder of latents."""


def encode(
    data: DataConfig,
    out: str | Path,
    batch_size: int = 16,
    part_size: int = 512,
    mixed_precision: str = "no",
) -> Path:
    """Encode every picture of a source, training and held-out, with `data.vae`.

    An interrupted run continues where it stopped when it is started again. Under `accelerate
    launch` or `torchrun` each process encodes its share of the parts. On a complete cache with
    another `data.holdout`, only the statistics are computed again.

    Args:
        data: Which pictures, at what size, with which labels, by which VAE. `data.flip` false
            leaves the mirror images out, at half the time and space; the statistics are those of
            the training split, which `data.holdout` determines.
        out: Folder of the cache.
        batch_size: Pictures per call of the VAE.
        part_size: Pictures per file; an interrupted run loses at most the work of one file.
        mixed_precision: `no`, or `bf16` for autocast: faster where the device has units for it,
            with latents that are rounded.

    Returns:
        The folder.

    Raises:
        UserError: The source or the VAE cannot be used, the folder holds something else or cannot
            be written, a latent is not finite, or another process has died.
    """
    folder = Path(out)
    if batch_size < 1 or part_size < 1:
        raise UserError(f"batch_size {batch_size} and part_size {part_size} must be at least 1")
    if mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {mixed_precision!r} must be no or bf16")
    if data.vae is None:
        raise UserError(
            "--vae is missing: give a hub id or a folder, e.g. stabilityai/sd-vae-ft-mse"
        )
    with (
        own_process_group(),
        report_dead_workers("start the same command again"),
        ExitStack() as claims,
    ):
        _encode(data, folder, batch_size, part_size, mixed_precision, claims)
    return folder


def _encode(
    data: DataConfig,
    folder: Path,
    batch_size: int,
    part_size: int,
    precision: str,
    claims: ExitStack,
) -> None:
    check_crop(data)
    vae = load_vae(str(data.vae))
    factor = scale_factor(vae)
    if data.resolution % factor:
        raise UserError(
            f"resolution {data.resolution} must be a multiple of {factor}, the factor by which "
            f"the latents of {data.vae} are smaller"
        )
    pictures = main_first(lambda: load_data(data, "all"))
    plan = _plan(data, pictures, vae, part_size) | {"mixed_precision": precision}
    begun = _read_if_present(folder / PLAN_FILE)
    if begun is not None and "known" not in begun:  # by an earlier version; continued as one
        del plan["known"]
    complete = on_main(lambda: _begin(folder, plan, claims))
    if complete is None:
        vae = vae.to(pick_device("auto"), memory_format=torch.channels_last)  # faster convolutions
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=precision == "bf16"):
            _write_parts(folder, plan, pictures, vae, batch_size)
        all_agree(True)  # waits for the parts of the others
    elif complete["statistics"]["holdout"] == data.holdout:
        logger.info("%s is complete already", folder)
        return
    on_main(lambda: _finish(folder, plan, data.holdout))


def _plan(data: DataConfig, pictures: PaintingDataset, vae: Vae, part_size: int) -> dict[str, Any]:
    path = Path(str(data.vae)).expanduser()
    config = vae.config
    cells = data.resolution // scale_factor(vae)
    with torch.device(vae.device):
        probe = posterior(vae, torch.zeros(1, 3, data.resolution, data.resolution))
    return {
        "format": FORMAT,
        "images": len(pictures),
        "skipped": pictures.skipped,
        "source": asdict(data),
        "source_fingerprint": pictures.fingerprint,
        "label_names": pictures.label_names,
        "known": {"columns": pictures.kinds, "sha256": sha256_of(pictures.known())},
        "resolution": data.resolution,
        "mirrored": data.flip,
        "part_size": part_size,
        "vae": {
            "name": str(path.resolve()) if path.is_dir() else data.vae,
            "class": type(vae).__name__,
            "sha256": weights_sha256(vae),
            "scaling_factor": config.scaling_factor,
            "shift_factor": getattr(config, "shift_factor", None),
        },
        "shape": [config.latent_channels, cells, cells],
        "has_std": probe[1] is not None,
        "dtype": "float16",
    }


def _begin(folder: Path, plan: dict[str, Any], claims: ExitStack) -> dict[str, Any] | None:
    """Write the plan, or check that the one in the folder is the same.

    Returns:
        What the cache holds if it is complete; it may then be read-only.
    """
    existing = _read_if_present(folder / PLAN_FILE)
    if existing is not None:
        _check_plan(folder, existing, plan)
    complete = _read_if_present(folder / CACHE_FILE)
    if complete is not None and complete["statistics"]["holdout"] == plan["source"]["holdout"]:
        return complete
    claims.enter_context(
        claim_folder(folder, LATENTS_KIND, is_earlier=lambda folder: existing is not None)
    )
    for written in (folder, part_path(folder, 0).parent):
        remove_partial_writes(written)  # of a process that was killed
    if existing is None:
        _write_json(folder / PLAN_FILE, plan)
    return complete


def _check_plan(folder: Path, existing: dict[str, Any], plan: dict[str, Any]) -> None:
    if existing.get("format") == FORMAT and existing["images"] != plan["images"]:
        raise UserError(
            f"the source had {existing['images']} usable images when {folder} was begun and has "
            f"{plan['images']} now: bring the others back, or encode into a new folder"
        )
    now, before = _identity(plan), _identity(existing)
    changed = [f"{key} {before[key]} (now {now[key]})" for key in now if now[key] != before[key]]
    if changed:
        raise UserError(
            f"{folder} was begun with {'; '.join(changed)}: repeat that command, or choose "
            "another --out"
        )


def _identity(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal to continue a plan; a VAE counts by its weights, not its place."""
    keys = ("format", "images", "source_fingerprint", "resolution", "mirrored", "part_size")
    hashed = {"vae": plan.get("vae"), "captions": plan.get("known")}
    return {key: plan.get(key) for key in keys} | {
        "mixed_precision": plan.get("mixed_precision", "no"),
        **{name: part["sha256"][:16] if part else "" for name, part in hashed.items()},
    }


def _write_parts(
    folder: Path,
    plan: dict[str, Any],
    pictures: PaintingDataset,
    vae: Vae,
    batch_size: int,
) -> None:
    features = _features(plan)
    size, total = plan["part_size"], plan["images"]
    shares = {
        rows[0] // size: range(rows[0], rows[-1] + 1)
        for rows in own_blocks(total, size)
        if not part_path(folder, rows[0] // size).exists()
    }
    with Progress("encoding", sum(map(len, shares.values())), "image", is_main()) as progress:
        for part, rows in shares.items():
            path = part_path(folder, part)
            columns: dict[str, Any] = {
                "sha256": [pictures.sha256(i) for i in rows],
                "name": [pictures.name(i) for i in rows],
            }
            for i, field in enumerate(pictures.label_names):
                columns[f"label_{field}"] = pictures.labels[rows.start : rows.stop, i].numpy()
            if "known" in plan:
                columns["known"] = pictures.known(rows)
            latents = _encode_rows(rows, pictures, vae, plan, batch_size, progress)
            for name, values in latents.items():
                flat = pa.array(values.reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
            table = pa.table(columns).cast(features.arrow_schema)
            with (
                writing(path),
                atomic_file(path) as scratch,
                ArrowWriter(path=str(scratch), features=features) as file,
            ):
                file.write_table(table)
                file.finalize()


@torch.inference_mode()
def _encode_rows(
    rows: range,
    pictures: PaintingDataset,
    vae: Vae,
    plan: dict[str, Any],
    batch_size: int,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Return `latents`, and `latents_std` of a posterior, as float16 (rows, sides, C, Y, X)."""
    batches: list[list[np.ndarray]] = []
    for start in range(rows.start, rows.stop, batch_size):
        indices = range(start, min(start + batch_size, rows.stop))
        sides = []
        for mirrored in (False, True)[: 1 + plan["mirrored"]]:
            images = pictures.clean(indices, torch.full((len(indices),), mirrored))
            sides.append(posterior(vae, images.to(vae.device)))
        columns = [
            torch.stack([x for x in column if x is not None], dim=1).half().cpu().numpy()
            for column in zip(*sides, strict=True)
            if column[0] is not None
        ]
        for column in columns:
            finite = np.isfinite(column).reshape(len(indices), -1).all(1)
            if not finite.all():
                bad = pictures.name(indices[int(np.flatnonzero(~finite)[0])])
                raise UserError(
                    f"the VAE {plan['vae']['name']} encodes {bad} as numbers that are NaN, "
                    "infinite or beyond fp16: its weights are damaged or made for another range"
                )
        batches.append(columns)
        progress.update(len(indices))
    names = ("latents", "latents_std")
    return {n: np.concatenate(c) for n, c in zip(names, zip(*batches, strict=True), strict=False)}


def _features(plan: dict[str, Any]) -> datasets.Features:
    features = datasets.Features.from_arrow_schema(pa.schema(part_schema(plan)))
    for field, names in plan["label_names"].items():
        features[f"label_{field}"] = datasets.ClassLabel(names=names)
    return features


def _finish(folder: Path, plan: dict[str, Any], holdout: float) -> None:
    """Compute the statistics of the training split and mark the cache as complete."""
    channels = plan["shape"][0]
    count, total, square = 0, np.zeros(channels), np.zeros(channels)
    for part in range(number_of_parts(plan)):
        table = datasets.Dataset.from_file(str(part_path(folder, part))).data
        train = [in_split(sha, holdout, "train") for sha in table.column("sha256").to_pylist()]
        columns = {}
        for name in ("latents", "latents_std")[: 1 + plan["has_std"]]:
            flat = [c.flatten().to_numpy() for c in table.column(name).chunks]
            values = np.concatenate(flat).reshape(len(train), -1, *plan["shape"])
            columns[name] = values[np.asarray(train)].astype(np.float64)
        latents = columns["latents"]
        count += latents.size // channels
        total += latents.sum((0, 1, 3, 4))
        # The variance of a posterior adds to that of its mean.
        square += sum((x**2).sum((0, 1, 3, 4)) for x in columns.values())
    if not count:
        raise UserError(f"no training pictures among {plan['images']}: lower holdout {holdout}")
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    constant = np.flatnonzero(~(std > 1e-6)).tolist()
    if constant:
        raise UserError(
            f"channels {constant} of the latents are the same number everywhere: this VAE cannot "
            "encode these pictures"
        )
    statistics = {"holdout": holdout, "mean": mean.tolist(), "std": std.tolist()}
    _write_json(folder / CACHE_FILE, plan | {"statistics": statistics})


def _read_if_present(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with writing(path), atomic_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
