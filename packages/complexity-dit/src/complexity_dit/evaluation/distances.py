"""Distances between two sets of features: functions on arrays, and torchmetrics metrics.

FID (Heusel et al., 2017), KID (Binkowski et al., 2018), precision and recall (Kynkaanniemi et al.,
2019), density and coverage (Naeem et al., 2020) and the Inception score (Salimans et al., 2016).
Sums, covariances and eigenvalues are in float64.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]
Indices = NDArray[np.intp]


def checked(features: Array, name: str) -> Array:
    """Features as a float32 or float64 array (n, D) of finite values, n at least 2."""
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
            f"{int(finite.argmin())}); check those images"
        )
    return x


def checked_pair(features1: Array, features2: Array) -> tuple[Array, Array]:
    """Both sets `checked`, with the same number of columns."""
    x1, x2 = checked(features1, "the first features"), checked(features2, "the second features")
    if x1.shape[1] != x2.shape[1]:
        raise UserError(
            f"features are {x1.shape[1]} and {x2.shape[1]} wide; use one extractor for both"
        )
    return x1, x2


# Frechet distance

RECOMMENDED_SAMPLES = 2048
# Rows of a covariance that are summed at once: memory stays at D x D for any n.
_COVARIANCE_ROWS = 4096
# Up to this size a singular value decomposition is about as fast as the eigenvalues.
_SMALL = 512


class Statistics(NamedTuple):
    """Mean (D,), unbiased covariance (D, D) and number of a set of features (0 if unknown)."""

    mu: Float64
    sigma: Float64
    n: int


def feature_statistics(features: Array) -> Statistics:
    """Mean and covariance (divided by n - 1) of features.

    Args:
        features: (n, D) with n >= 2.

    Raises:
        UserError: Fewer than 2 rows, or non-finite values.
    """
    x = checked(features, "features")
    mu = x.mean(0, dtype=np.float64)
    return Statistics(mu, _covariance(x, mu, np.ones(len(x))), len(x))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau, 1982).

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), in float64. With S = F F^T, the last
    trace is the sum of the singular values of F1^T F2. This avoids the square root of a product
    that may be singular, and is valid for covariances of any rank.

    Means are (D,), covariances (D, D). Rounding can make the distance of equal inputs slightly
    negative.

    Raises:
        UserError: Shapes do not match, values are not finite, or a covariance has an eigenvalue
            that is negative beyond rounding.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise UserError(f"statistics have shapes {shapes}; expected (D,), (D, D), (D,), (D, D)")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("statistics contain non-finite values; compute them again")
    traces = float(np.trace(sigma1) + np.trace(sigma2))
    return _frechet(mu1 - mu2, traces, _factor(sigma1), _factor(sigma2))


def fid_from_features(features1: Array, features2: Array) -> float:
    """`frechet_distance` of two sets of features.

    A set with at most D rows is a factor of its own covariance, so no (D, D) matrix is formed.

    Args:
        features1: (n1, D) with n1 >= 2; a warning is logged below 2048.
        features2: (n2, D) with n2 >= 2.

    Returns:
        The distance; it is FID if the features are Inception's pool3.

    Raises:
        UserError: Fewer than 2 rows, different numbers of columns, or non-finite values.
    """
    x1, x2 = checked_pair(features1, features2)
    _warn_if_few(min(len(x1), len(x2)), x1.shape[1])
    return distance_of_sets(x1, x2)


def fid_to_statistics(features: Array, reference: Statistics) -> float:
    """`frechet_distance` of features to stored statistics; arguments as in `fid_from_features`."""
    x = checked(features, "features")
    if x.shape[1] != reference.mu.size:
        raise UserError(
            f"features are {x.shape[1]} wide and the statistics {reference.mu.size}; they were "
            "made with another network"
        )
    _warn_if_few(min(len(x), reference.n) if reference.n else len(x), x.shape[1])
    own = feature_statistics(x)
    return frechet_distance(own.mu, own.sigma, reference.mu, reference.sigma)


def distance_of_sets(
    x1: Array, x2: Array, counts1: Float64 | None = None, counts2: Float64 | None = None
) -> float:
    """`fid_from_features` without checks; with counts, row i stands for so many equal images."""
    (mu1, trace1, factor1), (mu2, trace2, factor2) = _moments(x1, counts1), _moments(x2, counts2)
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
        # square s^2 becomes about delta / 2s in s; errors of different values add like random
        # numbers. Where this could matter, such as for sets that share a null space, the
        # singular values are computed instead.
        delta = 10 * np.finfo(np.float64).eps * float(squares[-1])
        each = delta / (np.sqrt(squares) + np.sqrt(delta) + 1e-300)
        if 2 * np.linalg.norm(each) <= max(3e-7 * distance, 1e-9 * traces):
            return distance
    return apart - 2 * float(np.linalg.svd(product, compute_uv=False).sum())


def _centred_rows(x: Array, mu: Float64, counts: Float64) -> Float64:
    """R (n - 1, D) with R^T R the covariance of x.

    A reflection maps the direction of the mean, u = (c / sum c)^(1/2), to the first row, which is
    dropped. The remaining rows have full rank, whereas x - mu has one row too many.
    """
    n, roots = counts.sum(), np.sqrt(counts)
    u = roots / np.sqrt(n)
    shift = (np.sqrt(n) * mu - roots[0] * x[0]) / (1 - u[0])
    return (roots[1:, None] * x[1:] - u[1:, None] * shift) / np.sqrt(n - 1)


def _covariance(x: Array, mu: Float64, counts: Float64) -> Float64:
    """Unbiased covariance (D, D) in float64, summed over blocks of rows."""
    total = np.zeros((x.shape[1], x.shape[1]))
    roots = np.sqrt(counts)[:, None]
    for start in range(0, len(x), _COVARIANCE_ROWS):
        rows = slice(start, start + _COVARIANCE_ROWS)
        block = (x[rows] - mu) * roots[rows]
        total += block.T @ block
    return total / (counts.sum() - 1)


def _factor(sigma: Float64) -> Float64:
    """F (D, rank) with F F^T = sigma."""
    try:
        return np.linalg.cholesky(sigma).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    # An eigenvalue below this is rounding noise, but its square root would not be small.
    floor = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    if values[0] < -1e3 * floor:
        raise UserError(
            f"a covariance has eigenvalues from {values[0]:.3e} to {values[-1]:.3e}; it must be "
            "positive semi-definite: compute the statistics again, in float64"
        )
    keep = values > floor
    return vectors[:, keep] * np.sqrt(values[keep])


def _warn_if_few(n: int, dimension: int) -> None:
    """Warn that a Frechet distance of few samples is strongly biased."""
    if n < RECOMMENDED_SAMPLES:
        singular = f", and the covariance is singular below the feature dimension {dimension}"
        logger.warning(
            "n is %d: below %d the Frechet distance is strongly biased%s; compare only with "
            "numbers at the same n",
            *(n, RECOMMENDED_SAMPLES, singular if n < dimension else ""),
        )


def inception_score(logits: Array, splits: int = 10) -> tuple[float, float]:
    """Inception score (Salimans et al., 2016): exp of the mean KL(p(y|x) || p(y)), over splits.

    Images are shuffled and split as in torch-fidelity with its default seed.

    Args:
        logits: (n, classes) of the classifier, without its bias (as in torch-fidelity and ADM).
        splits: Number of parts.

    Returns:
        Mean and population standard deviation over splits; the mean is between 1 and ``classes``.

    Raises:
        UserError: Fewer images than splits, or non-finite values.
    """
    x = checked(logits, "logits").astype(np.float64)
    n = len(x)
    if n < splits:
        raise UserError(f"an Inception score of {splits} splits needs as many images; got {n}")
    x = x[np.random.RandomState(2020).permutation(n)]
    log_p = x - x.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# Inner products of feature vectors, block by block, for kernel distances and neighbours

BLOCK_ROWS = 1024
"""Rows of a pairwise matrix that are computed at once: memory is this times n, for any n."""


class Centred(NamedTuple):
    """x - c in the features' own dtype (n, D), and x.c - c.c / 2 of each row in float64.

    x.y = (x - c).(y - c) + x.c + y.c - c.c. The part that all features share is exact, so float32
    products of float32 features, which are several times faster than float64 products, have an
    error of about 1e-7 of the variation of the features.
    """

    x: Array
    shift: Float64


def centred(x: Array, y: Array) -> tuple[Centred, Centred]:
    """Both sets about the average c of their means."""
    centre = (x.mean(0, dtype=np.float64) + y.mean(0, dtype=np.float64)) / 2
    dtype = np.result_type(x, y)

    def about_centre(z: Array) -> Centred:
        rounded, shift = np.empty(z.shape, dtype), np.empty(len(z))
        for rows in blocks(len(z)):
            exact = z[rows] - centre
            rounded[rows], shift[rows] = exact, exact @ centre
        return Centred(rounded, shift + centre @ centre / 2)

    return about_centre(x), about_centre(y)


def blocks(n: int) -> Iterator[slice]:
    """Slices of `BLOCK_ROWS` that cover n rows."""
    for start in range(0, n, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, n))


# Kernel distance

VARIANCE_ROWS = 8192
"""Images per side of which the variance of a kernel distance is estimated, if there are more."""


class KernelEstimate(NamedTuple):
    """KID over subsets.

    Attributes:
        mean: Mean over subsets: an unbiased estimate of the squared MMD.
        std: Population standard deviation over subsets, which overlap: it says how much a distance
            of one subset of the same images varies, and nothing about other images.
        stderr: Standard error of ``mean`` over new images; NaN for fewer than 4 images on a side.
        subsets: Number of subsets.
        subset_size: Rows per subset.
    """

    mean: float
    std: float
    stderr: float
    subsets: int
    subset_size: int

    def named(self, prefix: str) -> dict[str, float]:
        """The numbers under the names of the metrics, without a standard error that is NaN."""
        names = ("mean", "std") if np.isnan(self.stderr) else ("mean", "std", "stderr")
        return {f"{prefix}_{name}": getattr(self, name) for name in names}


def kid_from_features(
    features1: Array,
    features2: Array,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelEstimate:
    """Kernel distance: unbiased squared MMD with k(x, y) = (x.y / D + 1)^3, over random subsets.

    Each subset takes ``subset_size`` rows of each set without replacement; the draws equal those of
    torch-fidelity for the same seed. The kernel of all pairs of rows also gives the variance of the
    distance (`_variance`); with more than `VARIANCE_ROWS` rows, a random part of them does.

    Args:
        features1: (n1, D) with n1 >= 2.
        features2: (n2, D) with n2 >= 2.
        subsets: Number of subsets, at least 1.
        subset_size: Rows per subset, at least 2; reduced to the size of the smaller set.
        seed: Seed of the draws.

    Returns:
        Mean (may be slightly negative), population standard deviation over subsets, standard error
        of the mean, and the sizes used.

    Raises:
        UserError: As `fid_from_features`, or sizes below their minimum.
    """
    x1, x2 = checked_pair(features1, features2)
    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"subsets is {subsets} and subset_size is {subset_size}; expected at least 1 and 2"
        )
    n1, n2 = len(x1), len(x2)
    m = min(subset_size, n1, n2)
    if m == n1 == n2:
        logger.warning("each KID subset is the full set of %d: kid_std is meaningless", m)
    rng = np.random.RandomState(seed)
    draws = [(rng.choice(n1, m, False), rng.choice(n2, m, False)) for _ in range(subsets)]
    a, b = centred(x1, x2)
    if max(n1, n2) <= VARIANCE_ROWS:
        masks = np.zeros((n1, subsets)), np.zeros((n2, subsets))
        for s, (i, j) in enumerate(draws):
            masks[0][i, s] = masks[1][j, s] = 1.0
        sums = _three_sums(a, b, *masks)
        values = _mmd2(sums, m)
    else:
        ones = np.ones((m, 1))
        values = np.concatenate(
            [_mmd2(_three_sums(_rows(a, i), _rows(b, j), ones, ones), m) for i, j in draws]
        )
        i, j = (rng.choice(n, min(n, VARIANCE_ROWS), False) for n in (n1, n2))
        sums = _three_sums(_rows(a, i), _rows(b, j), np.empty((len(i), 0)), np.empty((len(j), 0)))
    # The mean over the subsets varies about the distance of all images, whose variance is added.
    variance = _variance(*sums, n1, n2) + values.var() / subsets
    return KernelEstimate(
        float(values.mean()), float(values.std()), float(np.sqrt(variance)), subsets, m
    )


class _Sums(NamedTuple):
    """Sums of k(x, y) over pairs of rows; within one set, over pairs of different rows.

    Over the pairs of each subset (S,), over the pairs of each row of x (n,) and of y (m,), and of
    k(x, y)^2 over all pairs.
    """

    subsets: Float64
    rows: Float64
    columns: Float64
    squares: float


def _three_sums(a: Centred, b: Centred, masks_a: Float64, masks_b: Float64) -> list[_Sums]:
    """Sums within the first set, within the second, and between both."""
    pairs = ((a, a, masks_a, masks_a), (b, b, masks_b, masks_b), (a, b, masks_a, masks_b))
    return [_kernel_sums(*pair) for pair in pairs]


def _kernel_sums(a: Centred, b: Centred, masks_a: Float64, masks_b: Float64) -> _Sums:
    """Sums of the kernel; that of a subset with the 0/1 mask z is z^T K z."""
    subsets, rows, columns = np.zeros(masks_a.shape[1]), np.zeros(len(a.x)), np.zeros(len(b.x))
    d, squares = a.x.shape[1], 0.0
    for block in blocks(len(a.x)):
        # Within one set the matrix is symmetric: entries to the right of the diagonal count twice.
        right = slice(block.start if a is b else 0, None)
        kernel = (a.x[block] @ b.x[right].T).astype(np.float64)
        kernel += a.shift[block, None]
        kernel += b.shift[right]
        kernel /= d
        kernel += 1.0
        kernel *= kernel * kernel
        if a is b:
            np.fill_diagonal(kernel, 0)
        rows[block] += kernel.sum(1)
        columns[right] += kernel.sum(0)
        squares += float(np.vdot(kernel, kernel))
        if a is b:
            beyond = kernel[:, len(kernel) :]
            rows[block.stop :] += beyond.sum(0)
            squares += float(np.vdot(beyond, beyond))
            beyond *= 2
        subsets += np.einsum("ns,ns->s", masks_a[block], kernel @ masks_b[right])
    return _Sums(subsets, rows, columns, squares)


def _rows(a: Centred, rows: Indices) -> Centred:
    return Centred(a.x[rows], a.shift[rows])


def _mmd2(sums: list[_Sums], m: int) -> Float64:
    """Unbiased squared MMD (Gretton et al., 2012, eq. 3) of subsets of m rows, (S,)."""
    xx, yy, xy = (each.subsets for each in sums)
    return (xx + yy) / (m * (m - 1)) - 2 * xy / (m * m)


def _variance(xx: _Sums, yy: _Sums, xy: _Sums, n1: int, n2: int) -> float:
    """Variance of the unbiased squared MMD of n1 and n2 images, from those of the sums.

    Both orders of Hoeffding's decomposition of a U-statistic are estimated (as in Sutherland &
    Deka, 2019). The first, a mean over images, decides where the distributions differ and vanishes
    where they are equal; the second, a mean over pairs, decides there.
    """
    p, q = len(xx.rows), len(yy.rows)
    if min(p, q) < 4:
        return float("nan")
    # Variances of the kernel without the mean of its row and column, with the degrees of freedom.
    within = [
        (s.squares - 2 * s.rows @ s.rows / (n - 2) + s.rows.sum() ** 2 / ((n - 1) * (n - 2)))
        / (n * (n - 3))
        for s, n in ((xx, p), (yy, q))
    ]
    squared_means = xy.rows @ xy.rows / q + xy.columns @ xy.columns / p
    between = (xy.squares - squared_means + xy.rows.sum() ** 2 / (p * q)) / ((p - 1) * (q - 1))
    second = 2 * within[0] / (n1 * (n1 - 1)) + 2 * within[1] / (n2 * (n2 - 1))
    second += 4 * between / (n1 * n2)
    # The mean kernel of an image varies also because the other images are finitely many.
    first = [
        (own / (n - 1) - others / m).var(ddof=1) - spread / (n - 1) - between / m
        for own, others, spread, n, m in (
            (xx.rows, xy.rows, within[0], p, q),
            (yy.rows, xy.columns, within[1], q, p),
        )
    ]
    return max(0.0, 4 * first[0] / n1 + 4 * first[1] / n2) + max(0.0, float(second))


# Nearest neighbours: precision, recall, density and coverage

PRECISION_NEIGHBOURS = 3
"""k of precision and recall (the value of the paper, and torch-fidelity's default)."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage (the value of the paper)."""


class Manifold(NamedTuple):
    """Overlap of two sets.

    Attributes:
        precision: Fraction of generated images inside the ball of a real one.
        recall: Fraction of real images inside the ball of a generated one.
        density: Mean number of real balls that contain a generated image, divided by k; it exceeds
            1 where real images are dense.
        coverage: Fraction of real images whose ball contains a generated image.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_overlap(
    generated: Array,
    real: Array,
    neighbours: int = PRECISION_NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
) -> Manifold:
    """Precision, recall, density and coverage.

    The ball of an image extends to its k-th nearest neighbour within its own set (Euclidean, the
    image itself not counted). No (n, n) matrix is stored: memory is `BLOCK_ROWS` rows of it.

    Args:
        generated: Features (n, D).
        real: Features (m, D).
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Raises:
        UserError: A set has no k-th neighbour, the numbers of columns differ, or values are not
            finite.
    """
    x, y = checked_pair(generated, real)
    most = max(neighbours, density_neighbours)
    if min(len(x), len(y)) <= most or min(neighbours, density_neighbours) < 1:
        raise UserError(
            f"sets of {len(x)} and {len(y)} images have no neighbours {neighbours} and "
            f"{density_neighbours}; more than {most} images per side are needed"
        )
    (x, _), (y, _) = centred(x, y)
    x_norms, y_norms = _norms(x), _norms(y)
    near_x, near_y = _neighbour_squares(x, x_norms, most), _neighbour_squares(y, y_norms, most)
    ball_x, ball_y = near_x[:, neighbours - 1], near_y[:, neighbours - 1]
    wide_y = near_y[:, density_neighbours - 1]

    precise = counted = 0
    recalled, covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for rows in blocks(len(x)):
        squares = _squares(x[rows], y, x_norms[rows], y_norms)
        precise += int((squares <= ball_y).any(1).sum())
        recalled |= (squares <= ball_x[rows, None]).any(0)
        in_wide = squares <= wide_y
        counted += int(in_wide.sum())
        covered |= in_wide.any(0)
    return Manifold(
        precision=precise / len(x),
        recall=float(recalled.mean()),
        density=counted / (density_neighbours * len(x)),
        coverage=float(covered.mean()),
    )


def nearest(x: Array, y: Array) -> tuple[Float64, NDArray[np.int64]]:
    """Euclidean distance (n,) and number (n,) of the nearest row of y (m, D) to each of x (n, D).

    Raises:
        UserError: Fewer than 2 rows, different numbers of columns, or non-finite values.
    """
    x, y = checked_pair(x, y)
    (centred_x, _), (centred_y, _) = centred(x, y)
    x_norms, y_norms = _norms(centred_x), _norms(centred_y)
    distances, indices = np.empty(len(x)), np.empty(len(x), np.int64)
    for rows in blocks(len(x)):
        best = _squares(centred_x[rows], centred_y, x_norms[rows], y_norms).argmin(1)
        indices[rows] = best
        # Computed again without the cancellation of |x|^2 + |y|^2 - 2 x.y.
        apart = x[rows].astype(np.float64) - y[best]
        distances[rows] = np.sqrt((apart * apart).sum(1))
    return distances, indices


def _norms(x: Array) -> Array:
    return np.einsum("nd,nd->n", x, x)


def _squares(x: Array, y: Array, x_norms: Array, y_norms: Array) -> Array:
    """Squared Euclidean distances (n, m), in the dtype of the features."""
    squares = x @ y.T
    squares *= -2
    squares += x_norms[:, None]
    squares += y_norms[None]
    return squares


def _neighbour_squares(x: Array, norms: Array, k: int) -> Array:
    """Squared distances (n, k) from each row to its k nearest other rows, ascending."""
    nearest_k = np.full((len(x), k), np.inf, norms.dtype)

    def keep(rows: slice, squares: Array) -> None:
        both = np.concatenate([nearest_k[rows], squares], 1)
        nearest_k[rows] = np.partition(both, k - 1, 1)[:, :k]

    for rows in blocks(len(x)):
        # The matrix is symmetric: a block to the right of the diagonal also serves its columns.
        for columns in blocks(len(x)):
            if columns.start < rows.start:
                continue
            squares = _squares(x[rows], x[columns], norms[rows], norms[columns])
            if columns.start == rows.start:
                np.fill_diagonal(squares, np.inf)
            else:
                keep(columns, squares.T)
            keep(rows, squares)
    return np.sort(nearest_k, 1)


# Bias and error of the Frechet distance. The distance of two samples is biased upwards by about
# c / n (Chong & Forsyth, 2020), because both means and both covariances are estimates. Both sides
# are taken at the same n, and the curve over 1 / n is extrapolated to 0.

NORMAL_95 = 1.959963984540054
MIN_PART = 8
"""Images in the smallest part of a curve."""
CURVE_PARTS, CURVE_SHUFFLES = (1, 2, 4, 8), 2
IMAGES_PER_FEATURE = 4
"""n over the feature dimension from which the error and the limit of a distance are worth showing.

In simulation (docs/results/tables/standard-errors.md), at n equal to the dimension or twice that,
`bootstrap` is up to 2.5 times too large, and `fid_curve` leaves up to four fifths of the bias. From
4 times the dimension, `bootstrap` is within 15 % where the distributions differ (where they are
equal, it stays up to 2.2 times too large: on the safe side), and `fid_curve` removes about 80 % of
the bias or more.
"""


class FidCurve(NamedTuple):
    """Distance over n and its extrapolation to infinite n.

    Attributes:
        sizes: n of each point, descending.
        values: Mean distance over disjoint parts of that size.
        infinity: Value at 0 of the weighted straight line over 1 / n.
        low: Lower end of its 95 % interval.
        high: Upper end.
        curvature: Change of ``infinity`` by a term in 1 / n^2, which is part of the interval. It is
            large where n is not far above the feature dimension, where the curve is not straight.
    """

    sizes: list[int]
    values: list[float]
    infinity: float
    low: float
    high: float
    curvature: float


def bootstrap(features1: Array, features2: Array, rounds: int = 20, seed: int = 0) -> float:
    """Standard error of the Frechet distance when both sets are resampled with replacement.

    The resampled distances are larger than the distance itself (a resample has fewer different
    images and therefore more bias), so their standard deviation is used and not their quantiles.

    The relative error of the result is about 1 / sqrt(2 rounds). It is too large for fewer than
    `IMAGES_PER_FEATURE` images per feature.

    Raises:
        UserError: Fewer than 2 rounds, or features as in `fid_from_features`.
    """
    x1, x2 = checked_pair(features1, features2)
    if rounds < 2:
        raise UserError(f"bootstrap needs at least 2 rounds, not {rounds}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        (a, counts_a), (b, counts_b) = _resample(x1, rng), _resample(x2, rng)
        values.append(distance_of_sets(a, b, counts_a, counts_b))
    return float(np.std(values, ddof=1))


def _resample(x: Array, rng: np.random.Generator) -> tuple[Array, Float64]:
    """n draws with replacement: the different rows drawn, and the count of each."""
    counts = np.bincount(rng.integers(0, len(x), len(x)), minlength=len(x))
    return x[counts > 0], counts[counts > 0].astype(np.float64)


def fid_curve(features1: Array, features2: Array, stderr: float, seed: int = 0) -> FidCurve:
    """Distance at n, n/2, n/4 and n/8 and its extrapolation to infinite n.

    Both sets are shuffled and split into k disjoint parts; the point at n / k is the mean over the
    parts and over two shuffles. A straight line in 1 / n is fitted by least squares with the weight
    n / k (small parts say less about the line). The squared 95 % interval is the sum of the squared
    sampling error of the sets (``stderr``), that of the shuffles, and the square of twice the
    change by a term in 1 / n^2, as if each further term changed half as much as the one before it.

    Args:
        features1: (n1, D).
        features2: (n2, D); n is the smaller of n1 and n2.
        stderr: From `bootstrap`.
        seed: Seed of the shuffles.

    Raises:
        UserError: Fewer than 3 sizes have parts of at least `MIN_PART` images, or features as in
            `fid_from_features`.
    """
    x1, x2 = checked_pair(features1, features2)
    n = min(len(x1), len(x2))
    parts = [k for k in CURVE_PARTS if n // k >= MIN_PART]
    if len(parts) < 3:
        raise UserError(
            f"a curve over n needs 3 sizes of at least {MIN_PART} images; {n} images give "
            f"{len(parts)}"
        )
    rng = np.random.default_rng(seed)
    sizes = [n // k for k in parts]
    points = np.empty((CURVE_SHUFFLES, len(parts)))
    for r in range(CURVE_SHUFFLES):
        order1, order2 = rng.permutation(len(x1))[:n], rng.permutation(len(x2))[:n]
        for p, (k, size) in enumerate(zip(parts, sizes, strict=True)):
            if k == 1 and r > 0 and len(x1) == len(x2):
                points[r, p] = points[0, p]  # all images, in another order
                continue
            cuts = [slice(i * size, (i + 1) * size) for i in range(k)]
            points[r, p] = np.mean([distance_of_sets(x1[order1[c]], x2[order2[c]]) for c in cuts])
    line, parabola = (_at_zero(sizes, points, degree) for degree in (1, 2))
    infinity = float(line.mean())
    curvature = float(parabola.mean()) - infinity
    shuffled = float(line.std(ddof=1)) / np.sqrt(CURVE_SHUFFLES)
    half = float(np.sqrt(NORMAL_95**2 * (stderr**2 + shuffled**2) + (2 * curvature) ** 2))
    return FidCurve(
        sizes, points.mean(0).tolist(), infinity, infinity - half, infinity + half, curvature
    )


def _at_zero(sizes: Sequence[int], points: Float64, degree: int) -> Float64:
    """Values (shuffles,) at 1 / n = 0 of polynomials in 1 / n through points (shuffles, sizes)."""
    n = np.asarray(sizes, np.float64)
    # In units of the largest n the powers stay near 1.
    powers = np.vander(n.max() / n, degree + 1, increasing=True)
    root = np.sqrt(n / n.max())[:, None]
    return np.linalg.lstsq(powers * root, points.T * root, rcond=None)[0][0]


# Metrics for a training loop, over the functions above


class FeatureMetric(Metric):
    """Base of metrics of two sets of features.

    All features are kept, 4 D bytes per float32 image, and are gathered from all processes by
    ``compute``. Every process must have updated both sides at least once.
    """

    is_differentiable = False
    full_state_update = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("generated", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (n, D) to the real or to the generated set.

        Raises:
            UserError: The features are not (n, D).
        """
        if features.ndim != 2:
            raise UserError(f"features have shape {tuple(features.shape)}; expected (n, D)")
        (self.real if real else self.generated).append(features.detach())

    def _measured(self, measure: Callable[..., Any], *options: int) -> list[Tensor]:
        """The numbers that a function of the generated and the real features gives."""
        sides = []
        for name in ("generated", "real"):
            features = getattr(self, name)
            if len(features) == 0:
                raise UserError(
                    f"there are no {name} features; call update(features, real={name == 'real'})"
                )
            joined = dim_zero_cat(features).cpu()
            # NumPy has no bfloat16.
            sides.append((joined if joined.dtype == torch.float64 else joined.float()).numpy())
        values = np.atleast_1d(measure(*sides, *options))
        return list(torch.tensor(values, dtype=torch.float64, device=self.device))


class FrechetDistance(FeatureMetric):
    """`fid_from_features` as a metric; ``compute`` returns a float64 scalar."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance of all features so far."""
        return self._measured(fid_from_features)[0]


class KernelDistance(FeatureMetric):
    """`kid_from_features` as a metric, with its arguments and options of `torchmetrics.Metric`.

    ``compute`` returns mean and standard deviation over subsets, two float64 scalars.
    """

    higher_is_better = False

    def __init__(
        self, subsets: int = 100, subset_size: int = 1000, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.options = subsets, subset_size, seed

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the distance of all features so far."""
        mean, std, *_ = self._measured(kid_from_features, *self.options)
        return mean, std


class PrecisionRecall(FeatureMetric):
    """`manifold_overlap` as a metric.

    ``compute`` returns ``precision``, ``recall``, ``density`` and ``coverage`` by name, float64.
    """

    higher_is_better = True

    def compute(self) -> dict[str, Tensor]:
        """The overlap of all features so far."""
        return dict(zip(Manifold._fields, self._measured(manifold_overlap), strict=True))
