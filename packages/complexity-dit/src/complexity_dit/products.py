"""Inner products of feature vectors, block by block: kernel distances and neighbours."""

from collections.abc import Iterator
from copy import copy

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]
Indices = NDArray[np.intp]

BLOCK_ROWS = 1024
"""Rows of a matrix of pairs made at once: memory stays at rows x n for any n."""


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
        self.x = (x - centre).astype(dtype)
        self.y = self.x if y is None else (y - centre).astype(dtype)
        half = centre @ centre / 2
        self.x_shift = x @ centre - half
        self.y_shift = self.x_shift if y is None else y @ centre - half

    def pick(self, rows: Indices, columns: Indices | None = None) -> "CentredProducts":
        """The products of some rows of x with some of y; without ``columns``, among themselves."""
        part = copy(self)
        part.x, part.x_shift = self.x[rows], self.x_shift[rows]
        part.y, part.y_shift = part.x, part.x_shift  # one array: half of the work in the product
        if columns is not None:
            part.y, part.y_shift = self.y[columns], self.y_shift[columns]
        return part

    def transposed(self) -> "CentredProducts":
        """The products of y with x."""
        part = copy(self)
        part.x, part.x_shift, part.y, part.y_shift = self.y, self.y_shift, self.x, self.x_shift
        return part

    def block(self, rows: slice, columns: slice) -> Float64:
        """(x[rows] @ y[columns].T) in float64."""
        product = (self.x[rows] @ self.y[columns].T).astype(np.float64)
        product += self.x_shift[rows, None]
        product += self.y_shift[None, columns]
        return product
