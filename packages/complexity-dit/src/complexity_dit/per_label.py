"""Numbers by label: the nearest-class-mean classifier, and each label's own distances."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from complexity_dit.config import EvalConfig
from complexity_dit.kid import kid_from_features
from complexity_dit.metrics import Array, Float64, distance_of_sets
from inl_core.run.errors import UserError


def class_means(features: Array, labels: NDArray[np.integer]) -> dict[int, Float64]:
    """Mean feature vector of every class that has an image.

    Args:
        features: (n, D).
        labels: (n,) class ids; -1 is a missing label and is left out.

    Returns:
        Class id -> mean (D,), float64, ids ascending.

    Raises:
        UserError: Lengths differ, or every label is missing.
    """
    x, labels = _labelled(features, labels)
    means = {int(c): x[labels == c].mean(0) for c in np.unique(labels) if c >= 0}
    if not means:
        raise UserError("no image has a label; class means need at least one")
    return means


def nearest_class_mean_accuracy(
    features: Array, labels: NDArray[np.integer], means: dict[int, Float64]
) -> float:
    """Share of labelled images whose nearest class mean (Euclidean) is that of their label.

    Args:
        features: (n, D).
        labels: (n,) class ids; images with -1 are left out, a class without a mean counts as a
            miss.
        means: From `class_means`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        UserError: Lengths differ, or every label is missing.
    """
    x, labels = _labelled(features, labels)
    known = labels >= 0
    if not known.any():
        raise UserError("no image has a label; the accuracy needs at least one")
    ids = np.array(sorted(means))
    centres = np.stack([means[int(i)] for i in ids])
    # |x - c|^2 without its |x|^2, which is the same for every class.
    scores = np.einsum("kd,kd->k", centres, centres) - 2 * x[known] @ centres.T
    return float((ids[scores.argmin(1)] == labels[known]).mean())


def _labelled(features: Array, labels: NDArray[np.integer]) -> tuple[Float64, NDArray[np.integer]]:
    x, labels = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or labels.shape != (len(x),):
        raise UserError(
            f"features have shape {x.shape} and labels {labels.shape}; expected (n, D) and (n,)"
        )
    return x, labels


def distances_by_label(
    generated: Array,
    generated_ids: NDArray[np.integer],
    real: Array,
    real_ids: NDArray[np.integer],
    names: list[str],
    config: EvalConfig,
    prefixes: tuple[str, str] = ("fid", "kid"),
) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distance of each label's own images, both sides at one n.

    Args:
        generated: Features (n, D) in the order of their draw.
        generated_ids: The label of each (n,), -1 for none.
        real: Features (m, D).
        real_ids: The label of each (m,).
        names: Names of the labels by id.
        config: ``label_min``, KID subsets and seed.
        prefixes: What the two distances are called.

    Returns:
        Name -> ``n_generated``, ``n_reference`` and either ``n`` (the smaller of both, used on
        both sides) with the distances, or ``skipped`` with the reason.
    """
    fd, kd = prefixes
    table: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(names):
        x, y = generated[generated_ids == label], real[real_ids == label]
        n = min(len(x), len(y))
        row: dict[str, Any] = {"n_generated": len(x), "n_reference": len(y)}
        if n < config.label_min:
            side = "samples" if len(x) < len(y) else "reference images"
            row["skipped"] = f"{n or 'no'} {side}, fewer than label_min = {config.label_min}"
        else:
            # Half of the images a subset: a subset that is the whole set has no spread.
            size = min(config.kid_subset_size, max(2, n // 2))
            kid = kid_from_features(x[:n], y[:n], config.kid_subsets, size, config.seed)
            row |= {"n": n, fd: distance_of_sets(x[:n], y[:n])}
            row |= {f"{kd}_mean": kid.mean, f"{kd}_std": kid.std, f"{kd}_stderr": kid.stderr}
        table[name] = row
    return table
