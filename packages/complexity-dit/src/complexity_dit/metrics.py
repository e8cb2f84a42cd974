"""Frechet distance of two sets of features (FID: Heusel et al., 2017) and the Inception score.

Numbers in, numbers out; sums, covariances and eigenvalues in float64.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]

RECOMMENDED_SAMPLES = 2048
# Rows of a covariance summed at once: memory stays at D x D for any n.
_BLOCK_ROWS = 4096
# Up to this size a singular value decomposition costs about what eigenvalues do.
_SMALL = 512


class Statistics(NamedTuple):
    """Mean (D,), unbiased covariance (D, D) and number of a set of features (0: not known)."""

    mu: Float64
    sigma: Float64
    n: int


def feature_statistics(features: Array) -> Statistics:
    """Mean and covariance (divided by n - 1) of features.

    Args:
        features: (n, D) with n >= 2.

    Returns:
        `Statistics` in float64.

    Raises:
        UserError: Fewer than 2 rows, or values that are not finite.
    """
    x = checked(features, "features")
    mu = x.mean(0, dtype=np.float64)
    return Statistics(mu, _covariance(x, mu, np.ones(len(x))), len(x))


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
    x1, x2 = checked_pair(features1, features2)
    warn_few(min(len(x1), len(x2)), x1.shape[1])
    return distance_of_sets(x1, x2)


def fid_to_statistics(features: Array, reference: Statistics) -> float:
    """`frechet_distance` of features to kept statistics; arguments as in `fid_from_features`."""
    x = checked(features, "features")
    if x.shape[1] != reference.mu.size:
        raise UserError(
            f"features are {x.shape[1]} wide and the statistics {reference.mu.size}; they were "
            "made with another network"
        )
    warn_few(min(len(x), reference.n) if reference.n else len(x), x.shape[1])
    own = feature_statistics(x)
    return frechet_distance(own.mu, own.sigma, reference.mu, reference.sigma)


def inception_score(logits: Array, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Inception score (Salimans et al., 2016): exp of the mean KL(p(y|x) || p(y)), over splits.

    The images are shuffled and split as torch-fidelity does it with its default seed.

    Args:
        logits: (n, classes) of the classifier, without its bias (as torch-fidelity and ADM do).
        splits: Parts whose scores are averaged.
        seed: Seed of the shuffle.

    Returns:
        Mean and population standard deviation over splits; both between 1 and ``classes``.

    Raises:
        UserError: Fewer images than splits, or values that are not finite.
    """
    x = checked(logits, "logits").astype(np.float64)
    n = len(x)
    if n < splits:
        raise UserError(f"an Inception score of {splits} splits needs as many images; got {n}")
    x = x[np.random.RandomState(seed).permutation(n)]
    log_p = x - x.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def distance_of_sets(
    x1: Array, x2: Array, counts1: Float64 | None = None, counts2: Float64 | None = None
) -> float:
    """`fid_from_features` without its checks and its warning, for many calls.

    With counts, row i stands for as many equal images: a resample costs no copies.
    """
    parts = [_moments(x1, counts1), _moments(x2, counts2)]
    (mu1, trace1, factor1), (mu2, trace2, factor2) = parts
    return _frechet(mu1 - mu2, trace1 + trace2, factor1, factor2)


def _moments(x: Array, counts: Float64 | None) -> tuple[Float64, float, Float64]:
    """Mean, trace of the covariance and a factor F (D, rank) with F F^T the covariance."""
    counts = np.ones(len(x)) if counts is None else counts
    mu = counts @ x / counts.sum()
    if len(x) <= x.shape[1]:
        rows = _centred_rows(x, mu, counts)
        return mu, float(np.einsum("nd,nd->", rows, rows)), rows.T
    sigma = _covariance(x, mu, counts)
    return mu, float(np.trace(sigma)), _factor(sigma)


def _frechet(difference: Float64, traces: float, factor1: Float64, factor2: Float64) -> float:
    """|difference|^2 + traces - 2 |F1^T F2|_*, factors (D, rank)."""
    apart = float(difference @ difference) + traces
    product = factor1.T @ factor2
    if min(product.shape) > _SMALL:
        gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
        squares = torch.linalg.eigvalsh(torch.from_numpy(gram)).numpy().clip(0)
        distance = apart - 2 * float(np.sqrt(squares).sum())
        # Eigenvalues are several times faster than singular values, but an error delta in a
        # square s^2 is one of about delta / 2s in s; those of different values add up as random
        # numbers do. Where that could matter, as between sets that share a null space, the
        # singular values themselves are taken.
        delta = 10 * np.finfo(np.float64).eps * float(squares[-1])
        each = delta / (np.sqrt(squares) + np.sqrt(delta) + 1e-300)
        if 2 * np.linalg.norm(each) <= max(3e-7 * distance, 1e-9 * traces):
            return distance
    return apart - 2 * float(np.linalg.svd(product, compute_uv=False).sum())


def _centred_rows(x: Array, mu: Float64, counts: Float64) -> Float64:
    """R (n - 1, D) with R^T R the covariance of x.

    A reflection takes the direction of the mean, u = (c / sum c)^(1/2), onto the first row, which
    is dropped: the rows left have full rank, where those of x - mu are one too many.
    """
    n, roots = counts.sum(), np.sqrt(counts)
    u = roots / np.sqrt(n)
    shift = (np.sqrt(n) * mu - roots[0] * x[0]) / (1 - u[0])
    return (roots[1:, None] * x[1:] - u[1:, None] * shift) / np.sqrt(n - 1)


def _covariance(x: Array, mu: Float64, counts: Float64) -> Float64:
    """Unbiased covariance (D, D) in float64, summed over blocks of rows."""
    total = np.zeros((x.shape[1], x.shape[1]))
    roots = np.sqrt(counts)[:, None]
    for start in range(0, len(x), _BLOCK_ROWS):
        block = (x[start : start + _BLOCK_ROWS] - mu) * roots[start : start + _BLOCK_ROWS]
        total += block.T @ block
    return total / (counts.sum() - 1)


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


def checked(features: Array, name: str) -> Array:
    """Features as float32 or float64 (n, D), n at least 2 and every value finite.

    Raises:
        UserError: Another shape, fewer rows, or values that are not finite, with their number.
    """
    x = np.asarray(features)
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise UserError(
            f"{name} have shape {x.shape}; a distance needs (n, D) with n of at least 2 images"
        )
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise UserError(
            f"{int((~finite).sum())} of {len(x)} rows of {name} are not finite (the first is row "
            f"{int(finite.argmin())}); look at those images"
        )
    return x


def checked_pair(features1: Array, features2: Array) -> tuple[Array, Array]:
    """Both sets `checked`, and of one width.

    Raises:
        UserError: As `checked`, or widths that differ.
    """
    x1, x2 = checked(features1, "the first features"), checked(features2, "the second features")
    if x1.shape[1] != x2.shape[1]:
        raise UserError(
            f"features are {x1.shape[1]} and {x2.shape[1]} wide; use one extractor for both"
        )
    return x1, x2


def warn_few(n: int, dimension: int) -> None:
    """Log that a Frechet distance of few samples is strongly biased."""
    if n < RECOMMENDED_SAMPLES:
        logger.warning(
            "n is %d: below %d the Frechet distance is strongly biased%s; compare only with "
            "numbers at the same n",
            n,
            RECOMMENDED_SAMPLES,
            f", and below the feature dimension {dimension} it is no full covariance's"
            if n < dimension
            else "",
        )
