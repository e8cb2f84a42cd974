"""Distances and accuracies computed from feature arrays: numbers in, numbers out.

Frechet distance (FID: Heusel et al., 2017) and kernel distance (KID: Binkowski et al., 2018) of
two sets of features, and the nearest-class-mean classifier that checks labels. NumPy, float64.
"""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from complexity_dit.errors import UserError

logger = logging.getLogger(__name__)

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]

RECOMMENDED_SAMPLES = 2048
# Rows of the kernel matrix held at once: memory stays at rows x n for any n.
_KERNEL_ROWS = 1024


class Statistics(NamedTuple):
    """Mean (D,), unbiased covariance (D, D) and number of a set of features."""

    mu: Float64
    sigma: Float64
    n: int


class KernelDistance(NamedTuple):
    """KID over subsets: mean, spread, standard error of the mean, and how it was subsampled."""

    mean: float
    std: float
    stderr: float
    subsets: int
    subset_size: int


def feature_statistics(features: Array) -> Statistics:
    """Mean and covariance (divided by n - 1) of features.

    Args:
        features: (n, D) with n >= 2.

    Returns:
        `Statistics` in float64.

    Raises:
        UserError: Fewer than 2 rows, or values that are not finite.
    """
    x = _checked(features, "features")
    mu = x.mean(0)
    x = x - mu
    return Statistics(mu, x.T @ x / (len(x) - 1), len(x))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau, 1982).

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), in float64. With S = F F^T the trace
    term is the sum of the singular values of F1^T F2, which needs no square root of a product
    that may be singular: right for covariances of any rank.

    Args:
        mu1: Mean, (D,).
        sigma1: Covariance, (D, D), symmetric and positive semi-definite.
        mu2: Mean, (D,).
        sigma2: Covariance, (D, D).

    Returns:
        The distance; rounding can leave it a little below 0 for equal inputs.

    Raises:
        UserError: Shapes do not fit, values are not finite, or a covariance has an eigenvalue
            that is negative beyond rounding.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise UserError(f"statistics have shapes {shapes}; expected (D,), (D, D), (D,), (D, D)")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("statistics hold values that are not finite; make them again")
    traces = float(np.trace(sigma1) + np.trace(sigma2))
    return _frechet(mu1 - mu2, traces, _factor(sigma1), _factor(sigma2))


def fid_from_features(features1: Array, features2: Array) -> float:
    """`frechet_distance` of two sets of features.

    A set with at most D rows is its own factor of its covariance, so no (D, D) matrix is made.

    Args:
        features1: (n1, D) with n1 >= 2; a warning is logged below 2048.
        features2: (n2, D) with n2 >= 2.

    Returns:
        The distance: FID when the features are Inception's pool3.

    Raises:
        UserError: Fewer than 2 rows, widths that differ, or values that are not finite.
    """
    x1, x2 = _checked_pair(features1, features2)
    mus, traces, factors = [], 0.0, []
    for x in (x1, x2):
        mu = x.mean(0)
        rows = (x - mu) / np.sqrt(len(x) - 1)
        mus.append(mu)
        traces += float(np.einsum("nd,nd->", rows, rows))
        factors.append(rows.T if len(x) <= x.shape[1] else _factor(rows.T @ rows))
    return _frechet(mus[0] - mus[1], traces, factors[0], factors[1])


def fid_to_statistics(features: Array, reference: Statistics) -> float:
    """`frechet_distance` of features to kept statistics; arguments as in `fid_from_features`."""
    x = _checked(features, "features")
    _warn_few(min(len(x), reference.n))
    own = feature_statistics(x)
    return frechet_distance(own.mu, own.sigma, reference.mu, reference.sigma)


def kid_from_features(
    features1: Array,
    features2: Array,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Kernel distance: unbiased squared MMD with k(x, y) = (x.y / D + 1)^3, over random subsets.

    Subset i takes ``subset_size`` rows of each set without replacement; the draws are those of
    torch-fidelity for the same seed.

    Args:
        features1: (n1, D) with n1 >= 2; a warning is logged below 2048.
        features2: (n2, D) with n2 >= 2.
        subsets: How many subsets, at least 1.
        subset_size: Rows a subset, at least 2; reduced to the smaller set (and reported so).
        seed: Seed of the draws.

    Returns:
        `KernelDistance`: mean and population standard deviation over subsets, the standard error
        std / sqrt(subsets), and the sizes used. The mean may be a little below 0.

    Raises:
        UserError: Fewer than 2 rows, widths that differ, values that are not finite, or sizes
            below their minimum.
    """
    x1, x2 = _checked_pair(features1, features2)
    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"subsets is {subsets} and subset_size is {subset_size}; expected at least 1 and 2"
        )
    m = min(subset_size, len(x1), len(x2))
    if m == len(x1) == len(x2):
        logger.warning("each KID subset is the whole set of %d: kid_std says nothing", m)
    rng = np.random.RandomState(seed)
    draws = [(rng.choice(len(x1), m, False), rng.choice(len(x2), m, False)) for _ in range(subsets)]
    # Few rows, many subsets: sum one kernel matrix under 0/1 masks instead of remaking its parts.
    masked = max(len(x1), len(x2)) ** 2 <= subsets * m * m
    values = _mmd2_masked(x1, x2, draws) if masked else _mmd2_direct(x1, x2, draws)
    std = float(values.std())
    return KernelDistance(float(values.mean()), std, std / float(np.sqrt(subsets)), subsets, m)


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


def _frechet(difference: Float64, traces: float, factor1: Float64, factor2: Float64) -> float:
    """|difference|^2 + traces - 2 |F1^T F2|_*, factors (D, rank)."""
    nuclear = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    return float(difference @ difference + traces - 2 * nuclear)


def _factor(sigma: Float64) -> Float64:
    """F (D, rank) with F F^T = sigma."""
    try:
        lower: Float64 = np.linalg.cholesky(sigma).astype(np.float64, copy=False)
        return lower
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    # Below this an eigenvalue is rounding; its square root would not be.
    floor = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    if values[0] < -1e3 * floor:
        raise UserError(
            f"a covariance has the eigenvalue {values[0]:.3e} beside {values[-1]:.3e}; it must be "
            "positive semi-definite: make the statistics again, in float64"
        )
    keep = values > floor
    factor: Float64 = vectors[:, keep] * np.sqrt(values[keep])
    return factor


def _kernel(x: Float64, y: Float64) -> Float64:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _mmd2_direct(
    x1: Float64, x2: Float64, draws: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
) -> Float64:
    """Unbiased squared MMD of each pair of subsets (Gretton et al., 2012, eq. 3)."""
    values = []
    for i, j in draws:
        a, b = x1[i], x2[j]
        k_aa, k_bb, m = _kernel(a, a), _kernel(b, b), len(i)
        within = (k_aa.sum() - np.trace(k_aa) + k_bb.sum() - np.trace(k_bb)) / (m * (m - 1))
        values.append(within - 2 * _kernel(a, b).mean())
    return np.array(values)


def _mmd2_masked(
    x1: Float64, x2: Float64, draws: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
) -> Float64:
    """The same values: a subset's kernel sum is z^T K z with z its 0/1 mask."""
    m = len(draws[0][0])
    masks1, masks2 = np.zeros((len(x1), len(draws))), np.zeros((len(x2), len(draws)))
    for s, (i, j) in enumerate(draws):
        masks1[i, s] = masks2[j, s] = 1.0

    def within(x: Float64, masks: Float64) -> Float64:
        diagonal = (np.einsum("nd,nd->n", x, x) / x.shape[1] + 1.0) ** 3
        return _masked_sums(x, x, masks, masks) - diagonal @ masks

    inside = (within(x1, masks1) + within(x2, masks2)) / (m * (m - 1))
    return inside - 2 * _masked_sums(x1, x2, masks1, masks2) / (m * m)


def _masked_sums(x: Float64, y: Float64, masks_x: Float64, masks_y: Float64) -> Float64:
    sums = np.zeros(masks_x.shape[1])
    for start in range(0, len(x), _KERNEL_ROWS):
        rows = slice(start, start + _KERNEL_ROWS)
        sums += np.einsum("ns,ns->s", masks_x[rows], _kernel(x[rows], y) @ masks_y)
    return sums


def _checked(features: Array, name: str) -> Float64:
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise UserError(
            f"{name} have shape {x.shape}; a distance needs (n, D) with n of at least 2 images"
        )
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(1).sum())
        raise UserError(f"{bad} of {len(x)} rows of {name} are not finite; look at those images")
    return x


def _checked_pair(features1: Array, features2: Array) -> tuple[Float64, Float64]:
    x1, x2 = _checked(features1, "the first features"), _checked(features2, "the second features")
    if x1.shape[1] != x2.shape[1]:
        raise UserError(
            f"features are {x1.shape[1]} and {x2.shape[1]} wide; use one extractor for both"
        )
    _warn_few(min(len(x1), len(x2)))
    return x1, x2


def _warn_few(n: int) -> None:
    if n < RECOMMENDED_SAMPLES:
        logger.warning(
            "n is %d: below %d the Frechet distance is strongly biased; compare only with "
            "numbers at the same n",
            n,
            RECOMMENDED_SAMPLES,
        )


def _labelled(features: Array, labels: NDArray[np.integer]) -> tuple[Float64, NDArray[np.integer]]:
    x, labels = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or labels.shape != (len(x),):
        raise UserError(
            f"features have shape {x.shape} and labels {labels.shape}; expected (n, D) and (n,)"
        )
    return x, labels
