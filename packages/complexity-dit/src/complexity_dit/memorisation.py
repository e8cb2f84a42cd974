"""Whether samples are copies: the nearest training image of each, beside those of held-out images.

Held-out images say how near an image can come to the training set without having seen it. Samples
that lie nearer than that, as a whole or a few of them, are worth looking at.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from complexity_dit.manifold import nearest
from complexity_dit.metrics import Array

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)
CLOSEST_PAIRS = 16


class Memorisation(NamedTuple):
    """Nearest training images.

    Attributes:
        samples: Distance from each sample to its nearest training image, (n,).
        heldout: The same of held-out images, (m,).
        pairs: (sample, training image, distance) of the closest samples, nearest first; each
            training image once.
    """

    samples: NDArray[np.float64]
    heldout: NDArray[np.float64]
    pairs: list[tuple[int, int, float]]

    @property
    def closer_than_1_percent(self) -> float:
        """Share of samples nearer than all but 1 % of held-out images; 0.01 when alike."""
        return float((self.samples < np.quantile(self.heldout, 0.01)).mean())

    @property
    def probability_closer(self) -> float:
        """Chance that a sample is nearer than a held-out image (ties half); 0.5 when alike."""
        ordered = np.sort(self.heldout)
        above = len(ordered) - np.searchsorted(ordered, self.samples, "right")
        equal = len(ordered) - np.searchsorted(ordered, self.samples, "left") - above
        return float((above + equal / 2).mean() / len(ordered))

    def summary(self) -> dict[str, Any]:
        """As JSON: quantiles of both, the two shares and the closest pairs."""
        levels = [f"{q:g}" for q in QUANTILES]
        return {
            "quantiles": {
                "samples": dict(zip(levels, np.quantile(self.samples, QUANTILES), strict=True)),
                "heldout": dict(zip(levels, np.quantile(self.heldout, QUANTILES), strict=True)),
            },
            "closer_than_1_percent": self.closer_than_1_percent,
            "probability_closer": self.probability_closer,
            "closest_pairs": [
                {"sample": i, "training_image": j, "distance": d} for i, j, d in self.pairs
            ],
        }


def memorisation(
    generated: Array, heldout: Array, train: Array, pairs: int = CLOSEST_PAIRS
) -> Memorisation:
    """Nearest training images of samples and of held-out images, in feature space.

    Args:
        generated: Features of samples (n, D).
        heldout: Features of held-out images (m, D).
        train: Features of training images (k, D).
        pairs: How many of the closest pairs to name.

    Returns:
        `Memorisation`.

    Raises:
        UserError: A set has fewer than 2 rows, widths differ, or values are not finite.
    """
    distances, neighbours = nearest(generated, train)
    from_heldout, _ = nearest(heldout, train)
    closest: dict[int, tuple[int, int, float]] = {}
    for i in np.argsort(distances, kind="stable"):
        j = int(neighbours[i])
        if j not in closest:
            closest[j] = (int(i), j, float(distances[i]))
        if len(closest) == pairs:
            break
    return Memorisation(distances, from_heldout, list(closest.values()))
