"""From the features of two sides to the numbers of a result, and the reasons for absent ones."""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from complexity_dit.bias import bootstrap, fid_curve
from complexity_dit.config import EvalConfig
from complexity_dit.inception import FeatureExtractor
from complexity_dit.kid import KernelDistance, kid_from_features
from complexity_dit.manifold import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    manifold_overlap,
)
from complexity_dit.metrics import (
    distance_of_sets,
    fid_from_features,
    fid_to_statistics,
    inception_score,
)
from complexity_dit.statistics_files import KeptStatistics
from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        metrics: Name -> number.
        absent: Name -> why it is not there.
        settings: What the numbers depend on besides the configuration.
        curve: The Frechet distance over n, as JSON; empty without.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)


def measure(
    generated: Features, real: Features, extractor: FeatureExtractor, config: EvalConfig
) -> Measurement:
    """All measures of two sets of features.

    Args:
        generated: (n, D) as the extractor gives them, spatial features included.
        real: (m, D).
        extractor: What gave them; names the distances.
        config: Which measures, and their settings.

    Returns:
        A `Measurement`.

    Raises:
        UserError: Fewer than 2 images on a side, or features that are not finite.
    """
    found = Measurement()
    fd, kd = extractor.prefixes
    x, y = pooled(generated, extractor), pooled(real, extractor)
    if "fid" in config.measures:
        found.metrics[fd] = fid_from_features(x, y)
        _spread_and_curve(found, fd, x, y, config)
    if "kid" in config.measures:
        kid = kid_of(x, y, config)
        found.metrics |= {f"{kd}_mean": kid.mean, f"{kd}_std": kid.std, f"{kd}_stderr": kid.stderr}
        found.settings["kid"] = {"subsets": kid.subsets, "subset_size": kid.subset_size}
    if "prdc" in config.measures:
        try:
            found.metrics |= manifold_overlap(x, y)._asdict()
            found.settings["neighbours"] = {
                "precision_recall": PRECISION_NEIGHBOURS,
                "density_coverage": DENSITY_NEIGHBOURS,
            }
        except UserError as error:
            found.absent["precision, recall, density, coverage"] = str(error)
    if "sfid" in config.measures:
        if extractor.spatial_dim:
            found.metrics["sfid"] = distance_of_sets(
                spatial(generated, extractor), spatial(real, extractor)
            )
        else:
            found.absent["sfid"] = _NO_SPATIAL
    _inception_score(found, x, extractor, config)
    return found


def measure_against(
    generated: Features,
    kept: KeptStatistics,
    extractor: FeatureExtractor,
    config: EvalConfig,
    source: str,
) -> Measurement:
    """What can be measured against kept statistics.

    Args:
        generated: (n, D) as the extractor gives them.
        kept: The statistics.
        extractor: What gave the features.
        config: Which measures.
        source: What the statistics are called in errors.

    Raises:
        UserError: The statistics were made with another extractor, resize or dtype (all named), or
            by a program that does not say and for another width.
    """
    check_identity(kept, extractor, source)
    found = Measurement()
    fd, kd = extractor.prefixes
    if "fid" in config.measures:
        found.metrics[fd] = fid_to_statistics(pooled(generated, extractor), kept.statistics)
    if "sfid" in config.measures:
        if extractor.spatial_dim and kept.spatial:
            found.metrics["sfid"] = fid_to_statistics(spatial(generated, extractor), kept.spatial)
        else:
            found.absent["sfid"] = (
                "the statistics hold no spatial features" if extractor.spatial_dim else _NO_SPATIAL
            )
    only = "the reference is statistics; this needs the images"
    found.absent[f"{fd}_stderr, {fd}_infinity"] = only
    if "kid" in config.measures:
        found.absent[kd] = only
    if "prdc" in config.measures:
        found.absent["precision, recall, density, coverage"] = only
    _inception_score(found, pooled(generated, extractor), extractor, config)
    return found


def check_identity(kept: KeptStatistics, extractor: FeatureExtractor, source: str) -> None:
    """Refuse statistics that this extractor did not make."""
    if kept.identity:
        own = extractor.identity
        differ = [
            f"{k} {kept.identity[k]}, not {own[k]}" for k in own if kept.identity[k] != own[k]
        ]
        if differ:
            raise UserError(
                f"{source} was made with another extractor: {'; '.join(differ)}. Evaluate with "
                "the same one, or make the statistics again (--save_statistics true)"
            )
    elif not extractor.is_inception:
        raise UserError(
            f"{source} cannot be compared with features of {extractor.name}: it does not say what "
            "it was made with, and such files hold Inception's"
        )
    elif kept.statistics.mu.size != extractor.feature_dim:
        raise UserError(
            f"{source} holds {kept.statistics.mu.size} features and {extractor.name} gives "
            f"{extractor.feature_dim}; it was made with another extractor"
        )
    else:
        logger.warning(
            "%s does not say which network and resize it was made with; it is taken to be "
            "Inception's pool3 with resize %s",
            source,
            extractor.resize,
        )


def pooled(features: Features, extractor: FeatureExtractor) -> Features:
    """The columns that distances are measured in."""
    return features[:, : extractor.feature_dim]


def spatial(features: Features, extractor: FeatureExtractor) -> Features:
    """The columns of sFID."""
    return features[:, extractor.feature_dim :]


def kid_of(x: Features, y: Features, config: EvalConfig) -> KernelDistance:
    """KID with the subsets of a configuration."""
    return kid_from_features(x, y, config.kid_subsets, config.kid_subset_size, config.seed)


_NO_SPATIAL = "sFID is defined on a layer of Inception; this is another network"


def _spread_and_curve(
    found: Measurement, fd: str, x: Features, y: Features, config: EvalConfig
) -> None:
    """The standard error of the distance, and its continuation to infinite n."""
    if not config.bootstrap:
        found.absent[f"{fd}_stderr"] = "bootstrap is 0"
        if config.curve:
            found.absent[f"{fd}_infinity"] = "its interval needs the bootstrap, which is 0"
        return
    spread = bootstrap(x, y, config.bootstrap, config.seed)
    found.metrics[f"{fd}_stderr"] = spread.stderr
    if not config.curve:
        return
    try:
        curve = fid_curve(x, y, spread.stderr, seed=config.seed)
    except UserError as error:
        found.absent[f"{fd}_infinity"] = str(error)
        return
    found.curve = curve._asdict()
    found.metrics |= {
        f"{fd}_infinity": curve.infinity,
        f"{fd}_infinity_low": curve.low,
        f"{fd}_infinity_high": curve.high,
    }


def _inception_score(
    found: Measurement, x: Features, extractor: FeatureExtractor, config: EvalConfig
) -> None:
    if "is" not in config.measures:
        return
    if extractor.classifier is None:
        found.absent["inception_score"] = (
            "the weights carry no classifier (fc): give pytorch-fid's or torch-fidelity's file"
            if extractor.is_inception
            else "it is defined on Inception's classifier; this is another network"
        )
        return
    try:
        mean, std = inception_score(x @ extractor.classifier.cpu().numpy().T)
        found.metrics |= {"inception_score_mean": mean, "inception_score_std": std}
    except UserError as error:
        found.absent["inception_score"] = str(error)
