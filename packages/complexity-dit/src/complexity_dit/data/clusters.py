"""Clusters of pictures as one more label field, for data with few labels or none.

A network that is conditioned on clusters learns faster than one without labels, and guidance works
(Hu et al., "Self-Guided Diffusion Models", arXiv 2210.06462; Adaloglou et al., "Rethinking
cluster-conditioned diffusion models", arXiv 2403.00570). Pictures or latents are compared as they
are, shrunk: no other network is needed, and clusters are of colour and composition.
"""

import copy
import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from complexity_dit.data.latents import TrainingData
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError

CLUSTER_FIELD = "cluster"
"""Name of the label field; the names of the clusters are their numbers."""

CLUSTERS_FILE = "clusters.safetensors"
"""In a pipeline folder: the `centres` (K, D) of the clusters that it was trained with."""

SIDE = 8
"""Cells along one side of what is compared."""

FIT_IMAGES = 2**14
"""Most pictures that the centres are computed of."""

_BLOCK = 512
_MAX_STEPS = 100

log = logging.getLogger(__name__)


def features(data: TrainingData, indices: Tensor) -> Tensor:
    """What of pictures or latents is compared, (n, D) float64.

    They are shrunk to `SIDE` cells and averaged with their mirror image, which training sees under
    the same labels; then half of the columns say everything.
    """
    blocks = []
    for block in indices.split(_BLOCK):
        x = data.clean(block, torch.zeros(len(block), dtype=torch.bool)).double()
        x = F.adaptive_avg_pool2d(x, min(SIDE, data.sample_size))
        x = (x + x.flip(-1)) / 2
        blocks.append(x[..., : (x.shape[-1] + 1) // 2].flatten(1))
    return torch.cat(blocks)


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres (K, D) of points (N, D): Lloyd's algorithm from k-means++.

    (Arthur & Vassilvitskii 2007.) Written here because scikit-learn is not a dependency, and the
    time of scipy's k-means++ grows with the square of K.

    Raises:
        UserError: There are fewer than K different points.
    """
    first = torch.randint(len(points), (1,), generator=generator)
    centres, gaps = [points[first]], (points - points[first]).square().sum(1)
    while len(centres) < count:
        if not gaps.any():
            raise UserError(
                f"clusters {count}: the training data have only {len(centres)} different pictures; "
                f"set --data.clusters to {len(centres)} or fewer, or 0 for none"
            )
        chosen = torch.multinomial(gaps, 1, generator=generator)
        centres.append(points[chosen])
        gaps = torch.minimum(gaps, (points - points[chosen]).square().sum(1))
    found, ids = torch.cat(centres), torch.empty(0)
    for _ in range(_MAX_STEPS):
        before, ids = ids, torch.cdist(points, found).argmin(1)
        if torch.equal(before, ids):
            break
        sizes = torch.bincount(ids, minlength=count)[:, None]
        sums = torch.zeros_like(found).index_add_(0, ids, points)
        found = torch.where(sizes > 0, sums / sizes.clamp(min=1), found)
    return found


def fit_clusters(data: TrainingData, count: int, seed: int) -> Tensor:
    """The centres (K, D), float32, of a training set; of random `FIT_IMAGES` of its pictures.

    Raises:
        UserError: It has fewer than K different pictures.
    """
    generator = generator_for(seed, "clusters")
    chosen = torch.randperm(len(data), generator=generator)[:FIT_IMAGES].sort().values
    centres = k_means(features(data, chosen), count, generator).float()
    log.info("%d clusters of %d training pictures", count, len(chosen))
    return centres


def nearest_clusters(data: TrainingData, centres: Tensor) -> Tensor:
    """The number of the nearest centre of each picture, int64 (N,).

    Raises:
        UserError: The centres are of pictures, or latents, of another kind.
    """
    ids = []
    for block in torch.arange(len(data)).split(_BLOCK):
        points = features(data, block)
        if points.shape[1] != centres.shape[1]:
            raise UserError(
                f"the clusters are of {centres.shape[1]} numbers a picture, and these data have "
                f"{points.shape[1]}: set --data.clusters 0, or train on the kind of data that "
                "init_from was trained on"
            )
        ids.append(torch.cdist(points, centres.double()).argmin(1))
    return torch.cat(ids)


def with_clusters(data: TrainingData, centres: Tensor, ids: Tensor) -> TrainingData:
    """A copy of the data with the label field `cluster`, whose fingerprint has the centres too."""
    if CLUSTER_FIELD in data.label_names:
        raise UserError(
            f"the data have a label field {CLUSTER_FIELD!r} already: leave it out with "
            "--data.label_fields, or set --data.clusters 0"
        )
    data = copy.copy(data)
    data.label_names = data.label_names | {CLUSTER_FIELD: [str(i) for i in range(len(centres))]}
    data.labels = torch.cat([data.labels, ids[:, None]], dim=1)
    digest = hashlib.sha256(data.fingerprint.encode() + centres.numpy().tobytes())
    data.fingerprint = digest.hexdigest()
    return data


def save_clusters(centres: Tensor, folder: Path) -> None:
    """Write the centres into a pipeline folder."""
    save_file({"centres": centres}, folder / CLUSTERS_FILE)


def read_clusters(folder: Path, count: int) -> Tensor:
    """Read the centres of a pipeline folder.

    Raises:
        UserError: The folder has none, or not `count`, or they cannot be read.
    """
    path = folder / CLUSTERS_FILE
    try:
        centres = load_file(path)["centres"]
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} was trained with clusters and has lost its {CLUSTERS_FILE}: take the folder "
            "as training wrote it, or set --data.clusters 0"
        ) from error
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if centres.shape[0] != count or centres.ndim != 2 or not centres.isfinite().all():
        raise UserError(
            f"{path} has centres of shape {tuple(centres.shape)}: set --data.clusters "
            f"{len(centres)}, which {folder} was trained with"
        )
    return centres
