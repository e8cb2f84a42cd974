"""How a Frechet distance depends on n: its value at several n, at infinite n, and its spread.

The distance of two samples is biased upwards by about c / n (Chong & Forsyth, 2020): both means
and both covariances are estimates. Here both sides are taken at the same n, as the evaluation
does, and the curve over 1 / n is continued to 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from complexity_dit.metrics import Array, Float64, checked_pair, distance_of_sets
from inl_core.run.errors import UserError

NORMAL_95 = 1.959963984540054
MIN_PART = 8
"""Images in the smallest part of a curve."""


class Curve(NamedTuple):
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


class Spread(NamedTuple):
    """Standard error of a distance at its n, from resampled images."""

    stderr: float
    rounds: int


def bootstrap(features1: Array, features2: Array, rounds: int = 20, seed: int = 0) -> Spread:
    """Standard error of the Frechet distance when both sets are drawn again with replacement.

    The resampled distances lie above the distance itself (a resample has fewer different images,
    so more bias), which is why their spread is used and not their quantiles.

    Args:
        features1: (n1, D).
        features2: (n2, D).
        rounds: Resamples; the relative error of the result is about 1 / sqrt(2 rounds).
        seed: Seed of the draws.

    Returns:
        `Spread`.

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
    return Spread(float(np.std(values, ddof=1)), rounds)


def fid_curve(
    features1: Array,
    features2: Array,
    stderr: float,
    parts: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 2,
    seed: int = 0,
    distance: Callable[[Array, Array], float] = distance_of_sets,
) -> Curve:
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
        `Curve`.

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
    return Curve(
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
