"""Numbers by label: the nearest-class-mean classifier, and each label's own distances."""

import numpy as np
from numpy.typing import NDArray

from complexity_dit.errors import UserError
from complexity_dit.metrics import Array, Float64


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
