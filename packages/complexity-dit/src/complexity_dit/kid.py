"""Kernel distance of two sets of features (KID: Binkowski et al., 2018)."""

import logging
from typing import NamedTuple

import numpy as np

from complexity_dit.metrics import checked_pair
from complexity_dit.products import (
    Array,
    CentredProducts,
    Float64,
    Indices,
    blocks,
    common_centre,
)
from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

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
