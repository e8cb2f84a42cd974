"""What two sets of features share: precision, recall, density and coverage by nearest neighbours.

Precision and recall: Kynkaanniemi et al., 2019; density and coverage: Naeem et al., 2020.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from complexity_dit.metrics import checked_pair
from complexity_dit.products import Array, CentredProducts, Float64, blocks, common_centre
from inl_core.run.errors import UserError

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
