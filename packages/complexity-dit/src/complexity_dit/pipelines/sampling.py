"""Sampling of seeded sets: image i has the same bits in every batch and on every process."""

import copy
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from complexity_dit.config import (
    ADAPTER_FILE,
    AUTOENCODER_KIND,
    SHIPPED,
    SampleConfig,
    StartConfig,
)
from complexity_dit.distributed import is_main, on_main, own_blocks
from complexity_dit.grids import draw_grid
from complexity_dit.hashing import array_hash, module_hash, weights_sha256
from complexity_dit.hub import reach_hub
from complexity_dit.labels import MISSING
from complexity_dit.models.loading import describe
from complexity_dit.models.text import checked_prompt
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sample_folders import (
    claim_samples,
    keep_image,
    kept_image,
    key_of,
    prepare_samples,
)
from complexity_dit.pipelines.schedulers import count_evaluations, named_scheduler, prediction_type
from complexity_dit.pipelines.starts import Between, FromPictures, Start, built_as, pictures_in
from complexity_dit.seeding import SEEDING, generator_for, uniform
from inl_core.run.checkpoints import check_damage, latest_checkpoint
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, finish_merge, read_text
from inl_core.run.folders import writing
from inl_core.run.json_files import MAX_JSON_BYTES, fits, one_line, read_json_object
from inl_core.run.progress import Progress
from inl_core.run.shipped import shipped

logger = logging.getLogger(__name__)

_COLUMNS = 8
MAX_GRID_ROWS = 64
"""Most rows of a grid that names no labels: one of 1,000 classes has 90 megapixels."""
_OTHER_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".mp4", ".npy", ".npz", ".pdf", ".png",
    ".svg", ".tar", ".tif", ".tiff", ".webp", ".zip",
}  # fmt: skip
_FOLDER_HINT = "give the path of a pipeline folder"
_PIPELINE_FILES = (ComplexityDiTPipeline.config_name, ADAPTER_FILE)


def find_pipeline(path: Path) -> Path | None:
    """The pipeline or adapter folder that a local path means.

    Args:
        path: That folder, a checkpoint, the folder of a run, which means its finished pipeline or
            adapter, else that of its newest checkpoint, or a name of `SHIPPED` in a clone.

    Returns:
        The folder, or None if there is nothing of these, as for a Hub id or a folder of images.

    Raises:
        UserError: It is a run that has saved nothing yet.
    """
    path = Path(shipped(str(path), SHIPPED))
    finish_merge(path)
    newest = latest_checkpoint(path / "checkpoints")
    for parent in filter(None, (path, newest)):
        for folder in (parent, parent / "pipeline", parent / "adapter"):
            if any((folder / name).is_file() for name in _PIPELINE_FILES):
                if parent == newest:
                    logger.info("%s is not finished: taking its newest checkpoint", path)
                return folder
    if (path / f".{AUTOENCODER_KIND}").is_file():
        return None
    if (path / "checkpoints").is_dir() or (path / "train_log.csv").is_file():
        raise UserError(f"{path} is a run that has not saved a checkpoint yet")
    return None


def load_pipeline(path: str) -> ComplexityDiTPipeline:
    """Load a pipeline or, into its base, an adapter.

    Args:
        path: A path for `find_pipeline`, a name of `SHIPPED`, or a Hub id.

    Raises:
        UserError: It is none of these, is damaged, or cannot be loaded.
    """
    path = shipped(path, SHIPPED)
    folder = find_pipeline(Path(path))
    if folder is None:
        if Path(path).exists() or path.count("/") != 1 or path[0] in ".~":
            raise UserError(
                f"{path} is not a pipeline folder (no {ComplexityDiTPipeline.config_name} in it); "
                "give one, a checkpoint (step-XXXXXXXX), the folder of a run, or a Hub id"
            )
        reach_hub(f"cannot load the pipeline {path}", _FOLDER_HINT)
    if folder is not None:
        check_damage(folder)
        if (folder / ADAPTER_FILE).is_file():
            return _load_with_adapter(folder)
    try:
        return ComplexityDiTPipeline.from_pretrained(folder or path)
    except Exception as error:  # of any type: diffusers checks few values of a folder's JSON
        reason, cause = describe(error), error.__cause__
        if folder is None and isinstance(cause, Exception) and not isinstance(error, UserError):
            # The message of diffusers itself refers to a stack trace.
            reason = f"{describe(cause).splitlines()[0]}; {_FOLDER_HINT}"
        raise UserError(f"cannot load the pipeline {path}: {reason}") from error


def _load_with_adapter(folder: Path) -> ComplexityDiTPipeline:
    path = folder / ADAPTER_FILE
    try:
        adapter = read_json_object(path)
        base: Any = adapter.get("base")
        sha256: Any = adapter.get("base_sha256")
        if not fits(base, str) or not fits(sha256, str):
            raise ValueError("`base` and `base_sha256` must be strings")
        local = folder / base
        is_local = local.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not describe an adapter: {error}") from error
    if (local / ADAPTER_FILE).is_file():
        raise UserError(f"{path} names another adapter as its base, {base!r}")
    pipe = load_pipeline(os.path.normpath(local) if is_local else base)
    if weights_sha256(pipe.transformer) != sha256:
        raise UserError(
            f"{folder} was trained on other weights than {base} has now: restore the base, or "
            f"change its path in {path}"
        )
    pipe.load_lora_weights(folder)
    return pipe


def load_guide(path: str, pipe: ComplexityDiTPipeline) -> ComplexityDiTTransformer2DModel:
    """Load the transformer of another pipeline with the same labels and objective as a guide."""
    guide = load_pipeline(path)
    if guide.id2label != pipe.id2label:
        raise UserError(
            f"--autoguidance {path} has other labels than the pipeline: use a model that was "
            "trained on the same data"
        )
    other, own = (prediction_type(p.scheduler) for p in (guide, pipe))
    if other != own:
        raise UserError(
            f"--autoguidance {path} predicts {other} and the pipeline {own}: use a model with the "
            "same objective"
        )
    return guide.transformer.to(pipe.device)


def pipeline_hash(pipe: ComplexityDiTPipeline) -> str:
    """Hex sha256 of the weights of all networks in a pipeline."""
    digest = hashlib.sha256()
    for name in sorted(pipe.components):
        part = pipe.components[name]
        if isinstance(part, nn.Module):
            digest.update(f"{name} {module_hash(part)}".encode())
    return digest.hexdigest()


def with_guidance(pipe: ComplexityDiTPipeline, config: SampleConfig) -> SampleConfig:
    """The config with the pipeline's own guidance where it names none."""
    own = {n: value for n, value in pipe.guidance.items() if getattr(config, n) is None}
    return replace(config, **own)


def scheduler_settings(pipe: ComplexityDiTPipeline, sample: SampleConfig) -> dict[str, Any]:
    """The scheduler that sampling uses, with its settings, and network evaluations per image."""
    sample = with_guidance(pipe, sample)
    scheduler = named_scheduler(pipe.scheduler, sample.scheduler, sample.shift)
    # DPM-Solver's settings contain an infinity, which JSON cannot represent as a number.
    config = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in scheduler.config.items()
        if not k.startswith("_")
    }
    # Without labels and text there is nothing that guidance could leave out.
    scale = (
        sample.guidance_scale
        if sample.autoguidance or pipe.transformer.config.label_fields or pipe.reads_text
        else 1.0
    )
    evaluations = count_evaluations(
        scheduler, sample.num_inference_steps, scale, sample.guidance_interval
    )
    return {
        "scheduler": {"class": type(scheduler).__name__, **config},
        "network_evaluations": evaluations,
    }


def recorded(config: SampleConfig) -> dict[str, Any]:
    """The settings of a result: all, but those younger than other results where they do nothing."""
    young = {"num_loops": None, "negative_prompt": None}
    return {k: v for k, v in asdict(config).items() if k not in young or v != young[k]}


def sample_settings(
    pipe: ComplexityDiTPipeline,
    labels: Tensor,
    config: SampleConfig,
    start: Start | None = None,
    prompts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything that determines the bits of the images."""
    config = with_guidance(pipe, config)
    sample, guide = recorded(config), {}
    sample.pop("batch_size")
    if config.internal_guidance_scale == 1:  # folders of older versions do not name it
        del sample["internal_guidance_scale"]
    if config.autoguidance is not None:
        guide["autoguidance_sha256"] = module_hash(load_guide(config.autoguidance, pipe))
    return {
        "pipeline_sha256": pipeline_hash(pipe),
        **guide,
        **scheduler_settings(pipe, config),
        "seeding": SEEDING,
        "labels_sha256": array_hash(labels.numpy()),
        "num_images": len(labels),
        "device": pipe.device.type,
        "dtype": str(pipe.transformer.dtype),
        **{f"sample.{name}": value for name, value in sample.items()},
        **(start.settings if start else {}),
        **({"prompts_sha256": _hash_of(prompts)} if prompts is not None else {}),
    }


def _hash_of(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] to uint8, rounded to nearest."""
    return (images * 255).round().clip(0, 255).astype(np.uint8)


def iter_samples(
    pipe: ComplexityDiTPipeline,
    labels: Tensor,
    config: SampleConfig,
    indices: Sequence[int] | None = None,
    progress: bool = True,
    start: Start | None = None,
    prompts: Sequence[str] | None = None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Generate images of a seeded set.

    Args:
        pipe: The pipeline.
        labels: Label ids of the whole set, (N, F) int64, -1 for not given; row i is for image i.
        config: Seed, sampler and batch.
        indices: Which images to generate, in ascending order; None means all N. With several
            processes, pass each its share.
        progress: Show a progress bar.
        start: What the images start from other than noise; its labels are used, and of `labels`
            only the number.
        prompts: A prompt for each image of the whole set, N; None for a model without text encoder
            and for the null text.

    Yields:
        Indices, and their images as uint8 (n, Y, X, 3), rounded to nearest.
    """
    guide = None if config.autoguidance is None else load_guide(config.autoguidance, pipe)
    # The caller's pipeline keeps its scheduler and its progress bar.
    pipe = copy.copy(pipe) if start is None else built_as(start.pipeline, pipe)
    pipe.scheduler = named_scheduler(pipe.scheduler, config.scheduler, config.shift)
    pipe.set_progress_bar_config(disable=True)
    indices = list(range(len(labels)) if indices is None else indices)
    with Progress("sampling", len(indices), "image", shown=progress) as done:
        for batch in _consecutive_batches(indices, config.batch_size):
            own = {"class_labels": labels[batch]} if start is None else start.arguments(pipe, batch)
            if prompts is not None:
                own["prompt"] = [prompts[i] for i in batch]
            if config.negative_prompt is not None:
                own["negative_prompt"] = config.negative_prompt
            images = pipe(
                **own,
                generator=[generator_for(config.seed, "sample", i) for i in batch],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                internal_guidance_scale=config.internal_guidance_scale,
                guidance_interval=config.guidance_interval,
                guide=guide,
                height=config.height,
                width=config.width,
                chunk_size=config.chunk_size,
                chunk_offset=batch[0] % config.chunk_size,
                num_loops=config.num_loops,
                output_type="np",
            ).images
            finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"sample {batch[finite.argmin()]} has values that are not finite "
                    f"({(~finite).sum()} of {len(batch)} images in its batch have): check the "
                    "weights, or lower the guidance_scale"
                )
            yield batch, to_uint8(images)
            done.update(len(batch))


def _consecutive_batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Runs of at most `size` consecutive indices, so that each image keeps its chunk position."""
    batch: list[int] = []
    for index in indices:
        if batch and (index != batch[-1] + 1 or len(batch) == size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def grid_labels(pipe: ComplexityDiTPipeline, columns: int, field: str | None = None) -> Tensor:
    """Labels of a grid, (rows * columns, F), one row per name of a field (by default the first).

    Of more than `MAX_GRID_ROWS` names so many are taken, in equal steps.
    """
    names = pipe.label_names
    if not names:
        return torch.full((columns * columns, 0), -1, dtype=torch.long)
    position = list(names).index(field) if field else 0
    count = len(list(names.values())[position])
    rows = min(count, MAX_GRID_ROWS)
    labels = torch.full((rows * columns, len(names)), -1)
    labels[:, position] = torch.arange(len(labels)) // columns * count // rows
    return labels


def sample(
    pipeline: str,
    out: str,
    num_images: int | None = None,
    labels: dict[str, list[str]] | None = None,
    sampling: SampleConfig | None = None,
    overwrite: bool = False,
    start: StartConfig | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
) -> Path:
    """Sample from a trained pipeline: a captioned grid, a folder of PNGs, or one .npz.

    Args:
        pipeline: Pipeline folder, checkpoint, folder of a run, or Hub id.
        out: A path ending in .png writes one grid; in .npz an ADM-style `arr_0` (N, Y, X, 3);
            anything else is a folder for 000000.png, 000001.png, and so on; but no name that ends
            like another kind of picture or archive.
        num_images: Number of images; by default a grid of the labels of the first field (of at most
            64 of them, in equal steps), else 64.
        labels: Names or ids per label field, e.g. `--labels.style Cubism Fauvism`; several names
            alternate. The others are those of a random training picture that has the named ones.
        sampling: Seed, sampler and batch.
        overwrite: Replace an existing file, or the images of other settings in a folder of samples.
            A folder of the same settings is completed in any case.
        start: Pictures to start from, or a strip between two images.
        prompt: A text, for a pipeline with a text encoder; labels that are not named are left out.
        prompts: A UTF-8 file with a prompt in each line, which alternate as labels do. Without
            `num_images`, one image of each, in a grid a row.

    Returns:
        What was written.

    Raises:
        UserError: If `out` is not a folder of these samples, exists, is the name of a file of
            another kind, or cannot be written, a label is unknown, a picture or the prompts cannot
            be read, or the pipeline has no text encoder.
    """
    sampling, start = sampling or SampleConfig(), start or StartConfig()
    if sampling.negative_prompt is not None:
        sampling = replace(sampling, negative_prompt=checked_prompt(sampling.negative_prompt))
    target = Path(out)
    is_file = target.suffix in (".png", ".npz")
    if not is_file and target.suffix.lower() in _OTHER_SUFFIXES and not target.is_dir():
        raise UserError(
            f"--out {target} would be a folder; expected FILE.png (one grid), FILE.npz (arr_0), or "
            "the name of a folder"
        )
    if start.image and target.is_dir() and target.resolve() == Path(start.image).resolve():
        raise UserError(f"--out {target} is the folder of --image: choose another --out")
    asked = labels or {}, _texts(prompt, prompts), num_images, sampling, start
    with ExitStack() as held:
        if is_file:
            on_main(lambda: _sample_file(pipeline, target, overwrite, *asked))
        else:
            on_main(lambda: held.enter_context(claim_samples(target)))
            _sample_folder(pipeline, target, overwrite, *asked)
    return target


def _sample_file(
    pipeline: str,
    target: Path,
    overwrite: bool,
    labels: dict[str, list[str]],
    texts: list[str],
    num_images: int | None,
    sampling: SampleConfig,
    start: StartConfig,
) -> None:
    """Write a grid or an archive."""
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; choose another --out or pass --overwrite true")
    is_grid = target.suffix == ".png"
    with writing(target), atomic_file(target) as aside:  # now: it may not be possible to write it
        pipe = load_pipeline(pipeline)
        rows, prompts, begin = _rows_and_start(
            pipe, labels, texts, num_images, sampling, start, is_grid
        )
        batches = iter_samples(pipe, rows, sampling, start=begin, prompts=prompts)
        images = np.concatenate([batch for _, batch in batches])
        with aside.open("wb") as file:
            if is_grid:
                draw_grid(images, _COLUMNS, _row_captions(pipe, rows, prompts)).save(
                    file, format="PNG"
                )
            else:
                np.savez(file, arr_0=images)
    print(f"wrote {len(rows)} images to {target}")


def _sample_folder(
    pipeline: str,
    folder: Path,
    overwrite: bool,
    labels: dict[str, list[str]],
    texts: list[str],
    num_images: int | None,
    sampling: SampleConfig,
    start: StartConfig,
) -> None:
    """Write the images that a claimed folder does not have yet; every process takes a share."""
    pipe = load_pipeline(pipeline)
    rows, prompts, begin = _rows_and_start(
        pipe, labels, texts, num_images, sampling, start, is_grid=False
    )
    settings = sample_settings(pipe, rows, sampling, begin, prompts)
    key = key_of(settings)

    def find_missing() -> list[int]:
        prepare_samples(folder, settings, overwrite)
        return [i for i in range(len(rows)) if kept_image(folder, i, key) is None]

    missing = on_main(find_missing)
    share = {i for block in own_blocks(len(rows), sampling.chunk_size) for i in block}
    own = [i for i in missing if i in share]
    for indices, batch in iter_samples(pipe, rows, sampling, own, is_main(), begin, prompts):
        for i, image in zip(indices, batch, strict=True):
            keep_image(folder, i, image, key)
    had = f", which had the other {len(rows) - len(missing)}" if len(missing) < len(rows) else ""
    on_main(lambda: print(f"wrote {len(missing)} images to {folder}{had}"))  # all are there


def drawn_labels(pipe: ComplexityDiTPipeline, labels: Tensor, seed: int) -> Tensor:
    """Labels of a seeded set, (N, F), with those drawn that are not given.

    Row i depends on its own labels and (seed, i) alone; see `ComplexityDiTPipeline.fill_labels`.
    """
    return pipe.fill_labels(labels, [uniform(seed, "labels", i) for i in range(len(labels))])


def _rows_and_start(
    pipe: ComplexityDiTPipeline,
    labels: dict[str, list[str]],
    texts: list[str],
    num_images: int | None,
    sampling: SampleConfig,
    start: StartConfig,
    is_grid: bool,
) -> tuple[Tensor, list[str] | None, Start | None]:
    """Label ids (N, F) and N prompts for the command line, and what images start from but noise.

    Labels and prompts alternate from image to image, in a grid from row to row.
    """
    if pipe.text_encoder is None and (texts or sampling.negative_prompt is not None):
        raise UserError(pipe.no_prompts(texts or sampling.negative_prompt))
    if num_images is not None and num_images < 1:
        raise UserError(f"num_images {num_images} must be at least 1")
    size = sampling.height or pipe.sample_size, sampling.width or pipe.sample_size
    table = _combinations(pipe, labels, len(texts))

    def prompts_of(numbers: Tensor) -> list[str] | None:
        return [texts[i % len(texts)] for i in numbers.tolist()] if texts else None

    if start.image:
        files = pictures_in(Path(start.image))
        numbers = torch.arange(num_images or len(files) * len(table)) % len(table)
        rows = table[numbers]
        mask = Path(start.mask) if start.mask else None
        begin = FromPictures(files, rows, size, mask, start.steps_share, len(table))
        return rows, prompts_of(numbers), begin
    if start.interpolate:
        if len(table) > 2 or len(texts) > 1:
            raise UserError(
                f"interpolate goes from one label to another, with at most one prompt, not over "
                f"{len(table)}"
            )
        seeds = sampling.seed, sampling.seed if start.to_seed is None else start.to_seed
        ends = [
            row[None] if texts else drawn_labels(pipe, row[None], seed)
            for row, seed in zip((table[0], table[-1]), seeds, strict=True)
        ]
        way = Between(torch.cat(ends), seeds, num_images or _COLUMNS, size)
        rows = torch.full((way.count, len(pipe.label_names)), MISSING)
        return rows, prompts_of(torch.zeros(way.count, dtype=torch.long)), way
    if not labels and not texts and is_grid:
        rows = grid_labels(pipe, _COLUMNS)
        rows = rows if num_images is None else rows[torch.arange(num_images) % len(rows)]
        return drawn_labels(pipe, rows, sampling.seed), None, None
    several = len(table) if len(texts) > 1 else 64
    count = num_images or (_COLUMNS * len(table) if is_grid else several)
    numbers = torch.arange(count) // (_COLUMNS if is_grid else 1) % len(table)
    rows = table[numbers]
    if texts:
        return rows, prompts_of(numbers), None
    return drawn_labels(pipe, rows, sampling.seed), None, None


def _texts(prompt: str | None, prompts: str | None) -> list[str]:
    """The prompts of a command; none if it names none."""
    if prompts is None:
        return [] if prompt is None else [checked_prompt(prompt)]
    if prompt is not None:
        raise UserError("prompt and prompts exclude each other: give one of them")
    try:
        lines = read_text(Path(prompts), MAX_JSON_BYTES, follow_links=True).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompts {prompts}: {error}") from error
    texts = [text for line in lines if (text := checked_prompt(line.removeprefix("\ufeff")))]
    if not texts:
        raise UserError(f"{prompts} has no prompt: write one in each line")
    return texts


def _combinations(
    pipe: ComplexityDiTPipeline, labels: dict[str, list[str]], prompts: int
) -> Tensor:
    """Label ids (n, F) of the named labels: field by field in turn, as many as the longest list.

    The list of prompts is one of these lists.
    """
    count = max(prompts, *(len(names) for names in labels.values()), 1)
    cycled = {
        field: [names[i % len(names)] for i in range(count)] for field, names in labels.items()
    }
    rows = pipe.get_label_ids(cycled)
    return rows.expand(count, -1)  # one, if no label is named


def _row_captions(
    pipe: ComplexityDiTPipeline, rows: Tensor, prompts: Sequence[str] | None
) -> list[str]:
    """The beginning of the prompt and the labels that all images of a grid row share, per row."""
    captions = []
    for i, row in enumerate(rows.split(_COLUMNS)):
        own = set(prompts[i * _COLUMNS : (i + 1) * _COLUMNS]) if prompts else set()
        parts = [shorten(one_line(own.pop()), 60, placeholder=" …")] if len(own) == 1 else []
        parts += [
            one_line(names[int(row[0, f])].replace("_", " "))
            for f, names in enumerate(pipe.label_names.values())
            if row[0, f] >= 0 and bool((row[:, f] == row[0, f]).all())
        ]
        captions.append(", ".join(parts))
    return captions
