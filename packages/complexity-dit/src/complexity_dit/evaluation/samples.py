"""Samples of a pipeline as a set of images, generated when they are read, kept and reused."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from complexity_dit.config import SampleConfig
from complexity_dit.distributed import on_main
from complexity_dit.evaluation.features import FEATURE_CHUNK
from complexity_dit.evaluation.image_sets import ImageSet
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from complexity_dit.pipelines.sample_folders import (
    keep_image,
    kept_image,
    key_of,
    prepare_samples,
)
from complexity_dit.pipelines.sampling import iter_samples, sample_settings


def generated_images(
    pipe: ComplexityDiTPipeline,
    labels: Tensor,
    config: SampleConfig,
    folder: Path | None = None,
    overwrite: bool = False,
    asked: dict[str, NDArray[np.int64]] | None = None,
    label_names: dict[str, list[str]] | None = None,
    prompts: list[str] | None = None,
) -> ImageSet:
    """Seeded samples of a pipeline.

    Args:
        pipe: The pipeline.
        labels: Label ids, (n, F) int64, -1 for not given.
        config: Seed, sampler and batch.
        folder: Folder that keeps the images; with None, an image read twice is generated twice.
        overwrite: Remove images of other settings from the folder.
        asked: Field -> requested ids (n,) in the numbering of the reference.
        label_names: Field -> names of those ids.
        prompts: n texts, for a pipeline with a text encoder.

    Returns:
        An `ImageSet` of n images; its fingerprint is a hash of the settings and the weights.

    Raises:
        UserError: The folder has images of other settings (named), and ``overwrite`` is false.
    """
    settings = sample_settings(pipe, labels, config, prompts=prompts)
    key = key_of(settings)
    if folder is not None:
        on_main(lambda: prepare_samples(folder, settings, overwrite))

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        images: dict[int, NDArray[np.uint8]] = {}
        if folder is not None:
            for number in numbers:
                image = kept_image(folder, number, key)
                if image is not None:
                    images[number] = image
        missing = sorted(set(numbers) - set(images))
        batches = iter_samples(pipe, labels, config, missing, progress=False, prompts=prompts)
        for indices, batch in batches:
            for number, image in zip(indices, batch, strict=True):
                images[number] = image
                if folder is not None:
                    keep_image(folder, number, image, key)
        return np.stack([images[number] for number in numbers])

    unit = math.lcm(config.chunk_size, FEATURE_CHUNK)
    asked, names = asked or {}, label_names or {}
    return ImageSet(
        name="samples",
        fingerprint=key,
        count=len(labels),
        size=(config.height or pipe.sample_size, config.width or pipe.sample_size),
        read=read,
        labels=np.stack([*asked.values()], 1) if asked else np.empty((len(labels), 0), np.int64),
        label_names={field: names[field] for field in asked},
        # Full chunks of the pipeline and of the feature network, at least one batch.
        block=unit * math.ceil(config.batch_size / unit),
    )
