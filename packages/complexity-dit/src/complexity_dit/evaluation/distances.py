"""Frechet distance of two sets of features (FID: Heusel et al., 2017) and the Inception score.

Numbers in, numbers out; sums, covariances and eigenvalues in float64.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from inl_core.run.errors import UserError

# Inner products of feature vectors, block by block: kernel distances and neighbours.

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]
Indices = NDArray[np.intp]

BLOCK_ROWS = 1024
"""Rows of a matrix of pairs made at once: memory stays at rows x n for any n."""
STRIP_ROWS = 64
"""Rows of a product of a thousand columns that stay in a processor's cache in float64."""


def common_centre(x: Array, y: Array) -> Float64:
    """Mean of the two sets' means, (D,)."""
    return (x.mean(0, dtype=np.float64) + y.mean(0, dtype=np.float64)) / 2


def blocks(n: int) -> Iterator[slice]:
    """Slices of `BLOCK_ROWS` that cover n rows."""
    for start in range(0, n, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, n))


class CentredProducts:
    """Inner products of two sets about a common centre in the features' own dtype.

    x.y = (x - c).(y - c) + x.c + y.c - c.c, the last three in float64: what all features share is
    exact, so that float32 products of float32 features, several times faster than float64, cost
    about 1e-7 of what the features vary by.

    Args:
        x: (n, D).
        y: (m, D); None for ``x`` itself.
        centre: (D,), about the mean of both.
    """

    def __init__(self, x: Array, y: Array | None, centre: Float64) -> None:
        dtype = x.dtype if y is None else np.result_type(x, y)
        self.x, self.x_shift = _centred(x, centre, dtype)
        self.y, self.y_shift = (self.x, self.x_shift) if y is None else _centred(y, centre, dtype)

    def pick(self, rows: Indices, columns: Indices) -> "CentredProducts":
        """The products of some rows of x with some of y."""
        part = copy(self)
        part.x, part.x_shift = self.x[rows], self.x_shift[rows]
        part.y, part.y_shift = self.y[columns], self.y_shift[columns]
        return part

    def themselves(self) -> "tuple[CentredProducts, CentredProducts]":
        """The products of x among themselves, and those of y."""
        first, second = copy(self), copy(self)
        first.y, first.y_shift = self.x, self.x_shift
        second.x, second.x_shift = self.y, self.y_shift
        return first, second

    def block(self, rows: slice, columns: slice) -> Float64:
        """(x[rows] @ y[columns].T) in float64."""
        return self._shifted(self.x[rows] @ self.y[columns].T, rows, columns)

    def strips(self, plus: float = 0.0) -> Iterator[Float64]:
        """All products, each with `plus` added, a few rows at a time, to pass over often."""
        products = self.x @ self.y.T
        for start in range(0, len(products), STRIP_ROWS):
            rows = slice(start, start + STRIP_ROWS)
            yield self._shifted(products[rows], rows, slice(None), plus)

    def upper_strips(self, plus: float = 0.0) -> Iterator[Float64]:
        """As `strips`, of different rows of x, each pair once, in half of the work.

        A strip begins at its diagonal; there and to the left of it stands 0.
        """
        products = self.x @ self.x.T  # numpy sees that it is symmetric and makes half of it
        for start in range(0, len(products), STRIP_ROWS):
            rows, columns = slice(start, start + STRIP_ROWS), slice(start, None)
            strip = self._shifted(products[rows, columns], rows, columns, plus)
            square = strip[:, : len(strip)]
            square[...] = np.triu(square, 1)
            yield strip

    def _shifted(self, products: Array, rows: slice, columns: slice, plus: float = 0.0) -> Float64:
        shifted = products.astype(np.float64)
        shifted += self.x_shift[rows, None] + plus
        shifted += self.y_shift[None, columns]
        return shifted


def _centred(x: Array, centre: Float64, dtype: np.dtype) -> tuple[Array, Float64]:
    """x - c in the dtype, and x.c - c.c / 2 of each row."""
    rounded, shift = np.empty(x.shape, dtype), np.empty(len(x))
    for rows in blocks(len(x)):
        exact = x[rows] - centre
        rounded[rows], shift[rows] = exact, exact @ centre
    return rounded, shift + centre @ centre / 2


logger = logging.getLogger(__name__)

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


Draws = list[tuple[Indices, Indices]]


class KernelDistance(NamedTuple):
    """KID over subsets: mean, spread, standard error of the mean, and how it was subsampled."""

    mean: float
    std: float
    stderr: float
    subsets: int
    subset_size: int


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
        features1: (n1, D) with n1 >= 2.
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
    x1, x2 = checked_pair(features1, features2)
    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"subsets is {subsets} and subset_size is {subset_size}; expected at least 1 and 2"
        )
    m = min(subset_size, len(x1), len(x2))
    if m == len(x1) == len(x2):
        logger.warning("each KID subset is the whole set of %d: kid_std says nothing", m)
    rng = np.random.RandomState(seed)
    draws = [(rng.choice(len(x1), m, False), rng.choice(len(x2), m, False)) for _ in range(subsets)]
    values = _mmd2(x1, x2, draws)
    std = float(values.std())
    return KernelDistance(float(values.mean()), std, std / float(np.sqrt(subsets)), subsets, m)


def _mmd2(x1: Array, x2: Array, draws: Draws) -> Float64:
    centre = common_centre(x1, x2)
    # Few rows, many subsets: sum one kernel matrix under 0/1 masks instead of remaking its parts.
    # The masks cost about half as much again as the matrix.
    masked = 1.5 * max(len(x1), len(x2)) ** 2 <= len(draws) * len(draws[0][0]) ** 2
    return (_mmd2_masked if masked else _mmd2_direct)(x1, x2, draws, centre)


def _mmd2_direct(x1: Array, x2: Array, draws: Draws, centre: Float64) -> Float64:
    """Unbiased squared MMD of each pair of subsets (Gretton et al., 2012, eq. 3)."""
    values, d = [], x1.shape[1]
    products = CentredProducts(x1, x2, centre)
    for i, j in draws:
        across, m = products.pick(i, j), len(i)
        within = sum(_cubes(s) for own in across.themselves() for s in own.upper_strips(plus=d))
        between = sum(_cubes(s) for s in across.strips(plus=d))
        values.append(2 * within / (m * (m - 1)) - 2 * between / (m * m))
    return np.array(values) / float(d) ** 3  # (p / d + 1)^3 = (p + d)^3 / d^3


def _cubes(strip: Float64) -> float:
    """Sum of p^3: two passes over what is in the processor's cache."""
    return float(np.vdot(strip * strip, strip))


def _mmd2_masked(x1: Array, x2: Array, draws: Draws, centre: Float64) -> Float64:
    """The same values: a subset's kernel sum is z^T K z with z its 0/1 mask."""
    m = len(draws[0][0])
    masks1, masks2 = np.zeros((len(x1), len(draws))), np.zeros((len(x2), len(draws)))
    for s, (i, j) in enumerate(draws):
        masks1[i, s] = masks2[j, s] = 1.0
    inside = sum(
        _masked_sums(CentredProducts(x, None, centre), masks, None)
        for x, masks in ((x1, masks1), (x2, masks2))
    )
    between = _masked_sums(CentredProducts(x1, x2, centre), masks1, masks2)
    return inside / (m * (m - 1)) - 2 * between / (m * m)


def _masked_sums(products: CentredProducts, masks_x: Float64, masks_y: Float64 | None) -> Float64:
    """Kernel sums of every subset; without ``masks_y``, of pairs of different rows of x."""
    sums = np.zeros(masks_x.shape[1])
    d = products.x.shape[1]
    for rows in blocks(len(masks_x)):
        if masks_y is not None:
            kernel = _cubed(products.block(rows, slice(None)), d)
            sums += np.einsum("ns,ns->s", masks_x[rows], kernel @ masks_y)
            continue
        # The matrix is symmetric: what is right of the diagonal counts twice.
        kernel = _cubed(products.block(rows, slice(rows.start, None)), d)
        own = kernel[:, : len(kernel)]
        np.fill_diagonal(own, 0)
        kernel[:, len(kernel) :] *= 2
        sums += np.einsum("ns,ns->s", masks_x[rows], kernel @ masks_x[rows.start :])
    return sums


def _cubed(products: Float64, d: int) -> Float64:
    """(p / d + 1)^3, in place."""
    products /= d
    products += 1.0
    squares = products * products
    products *= squares
    return products


# What two sets of features share: precision, recall, density and coverage by nearest neighbours.
#
# Precision and recall: Kynkaanniemi et al., 2019; density and coverage: Naeem et al., 2020.

PRECISION_NEIGHBOURS = 3
"""k of precision and recall (the paper's, and torch-fidelity's default)."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage (the paper's)."""


class Manifold(NamedTuple):
    """How two sets overlap.

    Attributes:
        precision: Share of generated images inside the ball of a real one.
        recall: Share of real images inside the ball of a generated one.
        density: Mean number of real balls a generated image is in, over k; above 1 where real
            images crowd.
        coverage: Share of real images with a generated one in their ball.
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

    The ball of an image reaches to its k-th nearest neighbour within its own set (Euclidean, the
    image itself not counted). No (n, n) matrix is held: memory is `BLOCK_ROWS` rows of one.

    Args:
        generated: Features (n, D).
        real: Features (m, D).
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.

    Returns:
        `Manifold`, four numbers.

    Raises:
        UserError: A set has no k-th neighbour, widths differ, or values are not finite.
    """
    x, y = checked_pair(generated, real)
    most = max(neighbours, density_neighbours)
    if min(len(x), len(y)) <= most or min(neighbours, density_neighbours) < 1:
        raise UserError(
            f"sets of {len(x)} and {len(y)} images have no neighbours {neighbours} and "
            f"{density_neighbours}; more than {most} images of each side are needed"
        )
    centre = common_centre(x, y)
    near_x = _neighbour_squares(x, most, centre)
    near_y = _neighbour_squares(y, most, centre)
    ball_x, ball_y = near_x[:, neighbours - 1], near_y[:, neighbours - 1]
    wide_y = near_y[:, density_neighbours - 1]

    pairs = _SquaredDistances(x, y, centre)
    inside, inside_any = 0, np.zeros(len(y), bool)
    recalled, counted = np.zeros(len(y), bool), 0
    for rows in blocks(len(x)):
        squares = pairs.block(rows, slice(None))
        inside += int((squares <= ball_y).any(1).sum())
        recalled |= (squares <= ball_x[rows, None]).any(0)
        in_wide = squares <= wide_y
        counted += int(in_wide.sum())
        inside_any |= in_wide.any(0)
    return Manifold(
        precision=inside / len(x),
        recall=float(recalled.mean()),
        density=counted / (density_neighbours * len(x)),
        coverage=float(inside_any.mean()),
    )


def nearest(x: Array, y: Array) -> tuple[Float64, NDArray[np.int64]]:
    """The nearest row of y for every row of x.

    Args:
        x: Features (n, D).
        y: Features (m, D), m at least 2.

    Returns:
        Euclidean distances (n,) and rows of y (n,).

    Raises:
        UserError: Fewer than 2 rows, widths that differ, or values that are not finite.
    """
    x, y = checked_pair(x, y)
    pairs = _SquaredDistances(x, y, common_centre(x, y))
    distances, indices = np.empty(len(x)), np.empty(len(x), np.int64)
    for rows in blocks(len(x)):
        best = pairs.block(rows, slice(None)).argmin(1)
        indices[rows] = best
        # The winner's distance once more, without the cancellation of |x|^2 + |y|^2 - 2 x.y.
        apart = x[rows].astype(np.float64) - y[best]
        distances[rows] = np.sqrt((apart * apart).sum(1))
    return distances, indices


class _SquaredDistances:
    """Squared Euclidean distances of rows, by block."""

    def __init__(self, x: Array, y: Array | None, centre: Float64) -> None:
        # |x - y|^2 does not change with the origin, so the products need no shift back.
        self.products = CentredProducts(x, y, centre)
        self.x_norms = _norms(self.products.x)
        self.y_norms = self.x_norms if y is None else _norms(self.products.y)

    def block(self, rows: slice, columns: slice) -> Array:
        """(rows, columns), in the dtype of the features."""
        squares = self.products.x[rows] @ self.products.y[columns].T
        squares *= -2
        squares += self.x_norms[rows, None]
        squares += self.y_norms[None, columns]
        return squares


def _norms(x: Array) -> Array:
    return np.einsum("nd,nd->n", x, x)


def _neighbour_squares(x: Array, k: int, centre: Float64) -> Array:
    """Squared distances (n, k) from each row to its k nearest others, ascending."""
    pairs = _SquaredDistances(x, None, centre)
    found = np.full((len(x), k), np.inf, pairs.x_norms.dtype)

    def keep(rows: slice, squares: Array) -> None:
        both = np.concatenate([found[rows], squares], 1)
        found[rows] = np.partition(both, k - 1, 1)[:, :k]

    for rows in blocks(len(x)):
        # The matrix is symmetric: a block right of the diagonal serves its columns as well.
        for columns in blocks(len(x)):
            if columns.start < rows.start:
                continue
            squares = pairs.block(rows, columns)
            if columns.start == rows.start:
                np.fill_diagonal(squares, np.inf)
            else:
                keep(columns, squares.T)
            keep(rows, squares)
    return np.sort(found, 1)


# How a Frechet distance depends on n: its value at several n, at infinite n, and its spread.
#
# The distance of two samples is biased upwards by about c / n (Chong & Forsyth, 2020): both means
# and both covariances are estimates. Here both sides are taken at the same n, as the evaluation
# does, and the curve over 1 / n is continued to 0.

NORMAL_95 = 1.959963984540054
MIN_PART = 8
"""Images in the smallest part of a curve."""


class FidCurve(NamedTuple):
    """Distance over n and its continuation to infinite n.

    Attributes:
        sizes: n of each point, descending.
        values: Mean distance over disjoint parts of that size.
        infinity: The weighted straight line over 1 / n, at 0.
        low: Lower end of the 95 % interval of ``infinity``.
        high: Its upper end.
        curvature: What a term in 1 / n^2 changes of ``infinity``; a part of the interval. Large
            where n is not far above the feature dimension: the line does not hold there.
    """

    sizes: list[int]
    values: list[float]
    infinity: float
    low: float
    high: float
    curvature: float


class BootstrapError(NamedTuple):
    """Standard error of a distance at its n, from resampled images."""

    stderr: float
    rounds: int


def bootstrap(
    features1: Array, features2: Array, rounds: int = 20, seed: int = 0
) -> BootstrapError:
    """Standard error of the Frechet distance when both sets are drawn again with replacement.

    The resampled distances lie above the distance itself (a resample has fewer different images,
    so more bias), which is why their spread is used and not their quantiles.

    Args:
        features1: (n1, D).
        features2: (n2, D).
        rounds: Resamples; the relative error of the result is about 1 / sqrt(2 rounds).
        seed: Seed of the draws.

    Returns:
        `BootstrapError`.

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
    return BootstrapError(float(np.std(values, ddof=1)), rounds)


def fid_curve(
    features1: Array,
    features2: Array,
    stderr: float,
    parts: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 2,
    seed: int = 0,
    distance: Callable[[Array, Array], float] = distance_of_sets,
) -> FidCurve:
    """The distance at n, n/2, n/4, ... and its continuation to infinite n.

    Both sets are shuffled and cut into k disjoint parts; the point at n / k is the mean over the
    parts and over ``repeats`` shuffles. A straight line in 1 / n is fitted by least squares with
    the weight n / k (small parts say less about the line). The 95 % interval adds, in squares,
    the sampling error of the sets (``stderr``), that of the shuffles, and twice what a term in
    1 / n^2 would change, as if each further term changed half as much as the one before.

    Args:
        features1: (n1, D).
        features2: (n2, D); n is the smaller of n1 and n2.
        stderr: Standard error of the distance at n, as from `bootstrap`.
        parts: Into how many parts the sets are cut, ascending from 1; those below `MIN_PART`
            images are left out.
        repeats: Shuffles.
        seed: Seed of the shuffles.
        distance: Of two sets of features.

    Returns:
        `FidCurve`.

    Raises:
        UserError: Fewer than 3 points are left, or features as in `fid_from_features`.
    """
    x1, x2 = checked_pair(features1, features2)
    n = min(len(x1), len(x2))
    parts = [k for k in parts if n // k >= MIN_PART]
    if len(parts) < 3:
        raise UserError(
            f"a curve over n needs 3 sizes of at least {MIN_PART} images; {n} images give "
            f"{len(parts)}"
        )
    rng = np.random.default_rng(seed)
    sizes = [n // k for k in parts]
    points = np.empty((repeats, len(parts)))
    for r in range(repeats):
        order1, order2 = rng.permutation(len(x1))[:n], rng.permutation(len(x2))[:n]
        for p, (k, size) in enumerate(zip(parts, sizes, strict=True)):
            if k == 1 and r > 0 and len(x1) == len(x2):
                points[r, p] = points[0, p]  # all images, in another order
                continue
            cuts = [slice(i * size, (i + 1) * size) for i in range(k)]
            points[r, p] = np.mean([distance(x1[order1[c]], x2[order2[c]]) for c in cuts])
    line, parabola = (_at_zero(sizes, points, degree) for degree in (1, 2))
    infinity = float(line.mean())
    curvature = float(parabola.mean()) - infinity
    shuffled = float(line.std(ddof=1)) / np.sqrt(repeats) if repeats > 1 else 0.0
    half = float(np.sqrt(NORMAL_95**2 * (stderr**2 + shuffled**2) + (2 * curvature) ** 2))
    return FidCurve(
        sizes, points.mean(0).tolist(), infinity, infinity - half, infinity + half, curvature
    )


def _at_zero(sizes: Sequence[int], points: Float64, degree: int) -> Float64:
    """Values (repeats,) at 1 / n = 0 of polynomials in 1 / n through points (repeats, sizes)."""
    n = np.asarray(sizes, np.float64)
    # In units of the largest n the powers stay near 1.
    powers = np.vander(n.max() / n, degree + 1, increasing=True)
    root = np.sqrt(n / n.max())[:, None]
    solution = np.linalg.lstsq(powers * root, points.T * root, rcond=None)[0]
    return solution[0]


def _resample(x: Array, rng: np.random.Generator) -> tuple[Array, Float64]:
    """n draws with replacement: the different rows drawn, and how often each was."""
    counts = np.bincount(rng.integers(0, len(x), len(x)), minlength=len(x))
    return x[counts > 0], counts[counts > 0].astype(np.float64)
