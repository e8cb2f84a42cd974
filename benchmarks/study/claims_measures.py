"""Measures for the paper's claims on images: denoising paths, colours, steadiness of FID.

*Smooth denoising.* At noise level s_k, k = 0 … K − 1, the velocity u of a flow network at the state
x_k predicts the final picture: y_k = x_k − s_k u(x_k, s_k). These predictions are the corners of a
path from the first, y_0, to the picture y_{K−1}. With d_k = y_{k+1} − y_k,

    total curvature = Σ_k angle(d_k, d_{k+1})          angle(a, b) = arccos(a·b / |a||b|) in [0, π]
    length / chord  = Σ_k |d_k| / |y_{K−1} − y_0|

The first is the total curvature of a polygon (Milnor, Annals of Mathematics 52, 1950): 0 for a
straight path, whatever its size and speed; it grows with every change of direction. The second is 1
for a straight path. Both depend on the number of steps: compare at equal K.

*Colour consistency.* The colours of a picture are its histogram over 8 × 8 × 8 cells of RGB.
Distances are Hellinger's, sqrt(1 − Σ_i sqrt(p_i q_i)), in [0, 1].

    palette to style = distance of the histogram of all samples of a style to that of its paintings
    picture to style = mean over samples of the distance of its own histogram to that of its style

averaged over styles with equal weight. Finite sets of one distribution differ as well, so both are
reported with a floor: other real paintings of the style, as many as there are samples.

*Steady FID.* Over the last checkpoints of a run: the variance, and the variance about a straight
line over the steps, because a run that still improves changes without being unsteady.
"""

import numpy as np
import torch

BINS = 8
FEWEST = 20
"""Smallest number of images of a style whose histogram is used."""


def total_curvature(path):
    """Total curvature of each path, in rad.

    Args:
        path: (K, B, D), K points of B paths. Points that repeat their predecessor add no angle.

    Returns:
        (B,) float64.
    """
    found = []
    for points in path.double().unbind(1):
        moves = points.diff(dim=0)
        lengths = moves.norm(dim=1)
        moved = lengths > 1e-12 * lengths.sum()
        ways = moves[moved] / lengths[moved, None]
        # Half-angle formula, exact near 0 and π, where arccos loses all digits.
        apart, along = (ways[1:] - ways[:-1]).norm(dim=1), (ways[1:] + ways[:-1]).norm(dim=1)
        found.append(2 * torch.atan2(apart, along).sum())
    return torch.stack(found)


def length_over_chord(path):
    """Length over chord of each path, (B,) float64; 1 for a path that does not move."""
    path = path.double()
    length = path.diff(dim=0).norm(dim=2).sum(0)
    chord = (path[-1] - path[0]).norm(dim=1)
    return torch.where(length > 0, length / chord, 1.0)


def histograms(images):
    """Colour histograms: uint8 (n, H, W, 3) -> shares (n, BINS³)."""
    cell = (images.astype(np.int64) * BINS) >> 8
    index = (cell[..., 0] * BINS + cell[..., 1]) * BINS + cell[..., 2]
    flat = index.reshape(len(images), -1)
    counts = [np.bincount(row, minlength=BINS**3) for row in flat]
    return np.stack(counts) / flat.shape[1]


def hellinger(p, q):
    """Hellinger distance of distributions along the last axis."""
    return np.sqrt(np.clip(1 - np.sqrt(p * q).sum(-1), 0, None))


def colour_distances(images, labels, real, real_labels):
    """Both distances to the paintings of the style, averaged over styles.

    Args:
        images: uint8 (n, H, W, 3).
        labels: Styles (n,); -1 for none.
        real: The paintings, uint8 (m, H, W, 3).
        real_labels: Their styles (m,).

    Returns:
        (palette to style, picture to style, number of styles).

    Raises:
        ValueError: If no style has `FEWEST` images in both sets.
    """
    generated, paintings = histograms(images), histograms(real)
    palettes, pictures = [], []
    for style in np.unique(labels[labels >= 0]):
        own, wanted = generated[labels == style], paintings[real_labels == style]
        if min(len(own), len(wanted)) < FEWEST:
            continue
        palette = wanted.mean(0)
        palettes.append(hellinger(own.mean(0), palette))
        pictures.append(hellinger(own, palette).mean())
    if not palettes:
        raise ValueError(
            f"no style has {FEWEST} pictures on both sides, of {len(images)} and {len(real)}: "
            "give a larger --num_images, or a source with larger styles"
        )
    return float(np.mean(palettes)), float(np.mean(pictures)), len(palettes)


def steadiness(steps, values):
    """Mean, variance, and variance about a straight line over the steps; needs 3 values."""
    if len(values) < 3:
        raise ValueError(f"{len(values)} checkpoints; a variance about a line needs at least 3")
    # `fit` centres and scales the steps, which may be large.
    line = np.polynomial.Polynomial.fit(steps, values, 1)
    rest = np.asarray(values) - line(np.asarray(steps))
    return {
        "mean": float(np.mean(values)),
        "variance": float(np.var(values, ddof=1)),
        "variance about its trend": float((rest**2).sum() / (len(values) - 2)),
    }
