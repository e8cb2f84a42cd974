"""Parts of an evaluation besides the distances: labels, floors and nearest training images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from complexity_dit.config import EvalConfig
from complexity_dit.evaluation.distances import (
    Array,
    Float64,
    distance_of_sets,
    kid_from_features,
    nearest,
)
from complexity_dit.hashing import module_hash
from inl_core.run.errors import UserError

# Memorisation: the nearest training image of each sample, compared with those of held-out images,
# which show how near an image comes to the training set without being a copy.

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)
CLOSEST_PAIRS = 16


class Memorisation(NamedTuple):
    """Distances to the nearest training images.

    Attributes:
        samples: Of each sample, (n,).
        heldout: Of each held-out image, (m,).
        pairs: (sample, training image, distance) of the closest samples, nearest first, each
            training image once.
        neighbours: Number of the nearest training image of each sample, (n,).
    """

    samples: NDArray[np.float64]
    heldout: NDArray[np.float64]
    pairs: list[tuple[int, int, float]]
    neighbours: NDArray[np.int64]

    @property
    def near_copies(self) -> NDArray[np.bool_]:
        """Which samples are nearer than 99 % of held-out images, (n,)."""
        return self.samples < np.quantile(self.heldout, 0.01)

    @property
    def closer_than_1_percent(self) -> float:
        """Fraction of near copies; 0.01 for equal distributions."""
        return float(self.near_copies.mean())

    @property
    def probability_closer(self) -> float:
        """Probability that a sample is nearer than a held-out image; ties count half."""
        ordered = np.sort(self.heldout)
        above = len(ordered) - np.searchsorted(ordered, self.samples, "right")
        equal = len(ordered) - np.searchsorted(ordered, self.samples, "left") - above
        return float((above + equal / 2).mean() / len(ordered))

    def summary(self) -> dict[str, Any]:
        """Quantiles of both sides, the two fractions and the closest pairs, as JSON."""
        sides = {"samples": self.samples, "heldout": self.heldout}
        return {
            "quantiles": {
                name: {f"{q:g}": np.quantile(side, q) for q in QUANTILES}
                for name, side in sides.items()
            },
            "closer_than_1_percent": self.closer_than_1_percent,
            "probability_closer": self.probability_closer,
            "closest_pairs": [
                {"sample": i, "training_image": j, "distance": d} for i, j, d in self.pairs
            ],
        }


def memorisation(generated: Array, heldout: Array, train: Array) -> Memorisation:
    """Find the nearest training images (k, D) of samples (n, D) and of held-out images (m, D).

    Raises:
        UserError: A set has fewer than 2 rows, the numbers of columns differ, or values are not
            finite.
    """
    distances, neighbours = nearest(generated, train)
    from_heldout, _ = nearest(heldout, train)
    closest: dict[int, tuple[int, int, float]] = {}
    for i in np.argsort(distances, kind="stable"):
        j = int(neighbours[i])
        if j not in closest:
            closest[j] = (int(i), j, float(distances[i]))
        if len(closest) == CLOSEST_PAIRS:
            break
    return Memorisation(distances, from_heldout, list(closest.values()), neighbours)


# Floors: distances that a perfect generator would also have, measured at the same n against the
# same reference images: those of training images, and of images after the VAE.

Transform = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

SHRUNK_SIZE = 8
SHRUNK_FILTER = "area mean down to 8x8, bicubic up, rounded to uint8"
VAE_CHUNK = 8
"""Images per call of the VAE; the last chunk is padded to this size."""


def shrink(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reduce uint8 (n, H, W, 3) to 8 x 8 and enlarge it (`SHRUNK_FILTER`): colours alone remain."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = F.interpolate(x, (SHRUNK_SIZE, SHRUNK_SIZE), mode="area")
    back = F.interpolate(small, x.shape[2:], mode="bicubic", align_corners=False)
    return _to_uint8(back)


def vae_reconstruction(vae: Any) -> tuple[Transform, str]:
    """Transform that encodes and decodes images, without noise: the limit of a latent model.

    Args:
        vae: With diffusers' interface: ``encode(x)`` gives ``latents`` or a ``latent_dist`` (whose
            mean is used), ``decode(z)`` a ``sample``; x in [-1, 1].

    Returns:
        The transform of uint8 (n, H, W, 3), and its name with the VAE's hash.
    """
    first = next(vae.parameters())

    @torch.inference_mode()
    def reconstruct(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        parts = []
        for start in range(0, len(images), VAE_CHUNK):
            part = images[start : start + VAE_CHUNK]
            padded = np.zeros((VAE_CHUNK, *part.shape[1:]), np.uint8)
            padded[: len(part)] = part
            x = torch.from_numpy(padded).permute(0, 3, 1, 2).to(first.device).float()
            encoded = vae.encode((x / 127.5 - 1).to(first.dtype))
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
            decoded = vae.decode(latents).sample.float()
            parts.append(_to_uint8((decoded + 1) * 127.5)[: len(part)])
        return np.concatenate(parts)

    how = f"{module_hash(vae)} on {first.device.type} in {first.dtype}, chunk {VAE_CHUNK}"
    return reconstruct, f"vae: {type(vae).__name__} {how}"


def _to_uint8(x: torch.Tensor) -> NDArray[np.uint8]:
    """(n, 3, H, W) floats in [0, 255] to uint8 (n, H, W, 3), rounded to nearest."""
    rounded = x.round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


# Labels: nearest-class-mean classifier, and the distances of each label


def class_means(features: Array, labels: NDArray[np.integer]) -> dict[int, Float64]:
    """Mean (D,) of features (n, D) by class id (n,), ids ascending; -1, no label, is left out.

    Raises:
        UserError: The lengths differ, or every label is missing.
    """
    x, labels = _labelled(features, labels)
    means = {int(c): x[labels == c].mean(0) for c in np.unique(labels) if c >= 0}
    if not means:
        raise UserError("no image has a label; class means need at least one")
    return means


def nearest_class_mean_accuracy(
    features: Array, labels: NDArray[np.integer], means: dict[int, Float64]
) -> float:
    """Fraction of labelled images whose nearest class mean (Euclidean) is that of their label.

    Args:
        features: (n, D).
        labels: (n,) class ids; images with -1 are left out, and a class without a mean counts as
            an error.
        means: From `class_means`.

    Raises:
        UserError: Lengths differ, or every label is missing.
    """
    x, labels = _labelled(features, labels)
    known = labels >= 0
    if not known.any():
        raise UserError("no image has a label; the accuracy needs at least one")
    ids = np.array(sorted(means))
    centres = np.stack([means[int(i)] for i in ids])
    # |x - c|^2 without |x|^2, which is equal for every class.
    scores = np.einsum("kd,kd->k", centres, centres) - 2 * x[known] @ centres.T
    return float((ids[scores.argmin(1)] == labels[known]).mean())


def _labelled(features: Array, labels: NDArray[np.integer]) -> tuple[Float64, NDArray[np.integer]]:
    x, labels = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or labels.shape != (len(x),):
        raise UserError(
            f"features have shape {x.shape} and labels {labels.shape}; expected (n, D) and (n,)"
        )
    return x, labels


def distances_by_label(
    generated: Array,
    generated_ids: NDArray[np.integer],
    real: Array,
    real_ids: NDArray[np.integer],
    names: list[str],
    config: EvalConfig,
    prefixes: tuple[str, str] = ("fid", "kid"),
) -> dict[str, dict[str, Any]]:
    """Frechet and kernel distance of the images of each label, with equal n on both sides.

    Features (n, D) and (m, D) come with the id of each label, -1 for none; ``prefixes`` name the
    two distances. The result has by name ``n_generated``, ``n_reference`` and either ``n`` (the
    smaller of both, used on both sides) with the distances, or ``skipped`` with the reason.
    """
    fd, kd = prefixes
    table: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(names):
        x, y = generated[generated_ids == label], real[real_ids == label]
        n = min(len(x), len(y))
        row: dict[str, Any] = {"n_generated": len(x), "n_reference": len(y)}
        if n < config.label_min:
            side = "samples" if len(x) < len(y) else "reference images"
            row["skipped"] = f"{n or 'no'} {side}, fewer than label_min = {config.label_min}"
        else:
            # Subsets of half the images: subsets of all images would have no spread.
            size = min(config.kid_subset_size, max(2, n // 2))
            kid = kid_from_features(x[:n], y[:n], config.kid_subsets, size, config.seed)
            row |= {"n": n, fd: distance_of_sets(x[:n], y[:n])} | kid.named(kd)
        table[name] = row
    return table
