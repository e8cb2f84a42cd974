"""The features of all sets an evaluation needs: both sides, and what floors and searches take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from complexity_dit.config import EvalConfig
from complexity_dit.features import draw, set_features
from complexity_dit.floors import SHRUNK_FILTER, shrink, vae_reconstruction
from complexity_dit.image_sets import ImageSet
from complexity_dit.inception import FeatureExtractor
from complexity_dit.measures import Features
from complexity_dit.subjects import Reference
from inl_core.run.errors import UserError

if TYPE_CHECKING:
    from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline


@dataclass
class Sides:
    """All features an evaluation needs, with the sets they are of; the same on every process."""

    generated: ImageSet
    picked: NDArray[np.int64]
    fake: Features
    ref: Reference
    rows: NDArray[np.int64]
    true: Features | None = None
    train: ImageSet | None = None
    train_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    seen: Features | None = None
    searched: Features | None = None
    searched_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    shrunk: Features | None = None
    reconstructed: Features | None = None
    vae: str = ""


def check_wishes(config: EvalConfig, ref: Reference, reference: str, folder: Path | None) -> None:
    """Say before any work what cannot be had."""
    if config.floors and ref.images is None:
        raise UserError(f"floors need images, and {reference} holds statistics; set floors false")
    if config.memorisation and ref.train is None:
        raise UserError(
            f"memorisation needs training images, and {reference} has none; give a data source "
            "(art, imagefolder:PATH, hub:NAME) as --reference, or set memorisation false"
        )
    if config.save_statistics and (folder is None or ref.images is None):
        raise UserError("save_statistics needs an output folder and a reference of images")


def collect(
    generated: ImageSet,
    picked: NDArray[np.int64],
    ref: Reference,
    rows: NDArray[np.int64],
    extractor: FeatureExtractor,
    config: EvalConfig,
    pipe: "ComplexityDiTPipeline | None",
) -> Sides:
    """Run the feature network over every set that is asked for; all processes take part."""

    def of(images: ImageSet, numbers: NDArray[np.int64], *transform: Any) -> Features:
        return set_features(images, numbers, extractor, config.cache, *transform)

    # Samples and given folders change from run to run: their features are not kept.
    kept = config.cache and generated.lasting
    fake = set_features(generated, picked, extractor, kept)
    sides = Sides(generated, picked, fake, ref, rows)
    if ref.images is None:
        return sides
    sides.true = of(ref.images, rows)
    named = pipe is not None and config.label_field in generated.label_names
    if ref.train and (config.floors or config.memorisation or named):
        sides.train = ref.train()
        count = len(sides.train)
        most = 0
        if config.memorisation:
            most = min(config.memorisation_images or count, count)
            sides.searched_rows = draw(count, most, config.seed)
            sides.searched = of(sides.train, sides.searched_rows)
        if config.floors or named:
            sides.train_rows = draw(count, len(rows), config.seed)
            if sides.searched is not None and most >= len(sides.train_rows):
                # Both draws begin alike: the search has these already.
                sides.seen = sides.searched[: len(sides.train_rows)]
            else:
                sides.seen = of(sides.train, sides.train_rows)
    if config.floors:
        sides.shrunk = of(ref.images, rows, shrink, f"shrunk: {SHRUNK_FILTER}")
        if pipe is not None and pipe.vae is not None:
            transform, sides.vae = vae_reconstruction(pipe)
            sides.reconstructed = of(ref.images, rows, transform, sides.vae)
    return sides
