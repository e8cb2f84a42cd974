"""Features of images in fixed network batches, with a disk cache for images of data sources."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from complexity_dit.distributed import all_agree, gather_rows, is_main, own_blocks
from complexity_dit.evaluation.image_sets import ImageSet
from complexity_dit.evaluation.networks import FeatureExtractor, cache_dir
from complexity_dit.hashing import array_hash
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, open_regular
from inl_core.run.progress import Progress

logger = logging.getLogger(__name__)

FEATURE_CHUNK = 32
"""Images per call of the feature network; the last chunk is padded to this size."""


def extract_features(
    batches: Iterable[NDArray[np.uint8]],
    extractor: FeatureExtractor,
    total: int | None = None,
    desc: str = "features",
) -> NDArray[np.float32]:
    """Compute features (N, D) of images, independent of how they are batched.

    Args:
        batches: uint8 (n, H, W, 3) arrays, any n, one H and W.
        extractor: The network.
        total: Number of images, to show how far it is; None if unknown.
        desc: What is done, to show it.

    Raises:
        UserError: No image at all, or batches that are not uint8 (n, H, W, 3) of one size.
    """
    features: list[NDArray[np.float32]] = []
    with Progress(desc, total, "image", shown=is_main()) as progress:
        for images in _rebatch(batches, FEATURE_CHUNK):
            n = len(images)
            # A convolution may sum in another order for another batch size: always FEATURE_CHUNK.
            padded = np.zeros((FEATURE_CHUNK, *images.shape[1:]), np.uint8)
            padded[:n] = images
            tensor = torch.from_numpy(padded).permute(0, 3, 1, 2).contiguous()
            features.append(extractor(tensor)[:n].numpy())
            progress.update(n)
    if not features:
        raise UserError("there are no images to compute features of")
    return np.concatenate(features)


def _rebatch(batches: Iterable[NDArray[np.uint8]], size: int) -> Iterator[NDArray[np.uint8]]:
    """Checked images in batches of `size`; the last one may be smaller."""
    pending: list[NDArray[np.uint8]] = []
    held, shape = 0, None
    for batch in batches:
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
            raise UserError(
                f"images are {batch.dtype} of shape {batch.shape}; expected uint8 (n, H, W, 3)"
            )
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise UserError(f"images are {batch.shape[1:]} and {shape}; make them one size")
        pending.append(batch)
        held += len(batch)
        if held >= size:
            images = np.concatenate(pending)
            end = held - held % size
            yield from (images[start : start + size] for start in range(0, end, size))
            pending, held = [images[end:]], held - end
    if held:
        yield np.concatenate(pending)


def draw(count: int, n: int, seed: int) -> NDArray[np.int64]:
    """The first min(n, count) entries of a seeded permutation of ``count`` images."""
    return np.random.default_rng(seed).permutation(count)[:n].astype(np.int64)


def set_features(
    images: ImageSet,
    rows: NDArray[np.int64],
    extractor: FeatureExtractor,
    cache: bool,
    transform: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    transform_name: str = "",
) -> NDArray[np.float32]:
    """Compute the features of some images of a set, or read them from the disk cache.

    With several processes, each computes blocks of full network batches, so that every image has
    the same position in the same batch for any number of processes.

    Args:
        images: The set.
        rows: Numbers of the images, (n,).
        extractor: The network.
        cache: Whether to use the user's cache folder.
        transform: Function of uint8 (n, H, W, 3) images that is applied first.
        transform_name: Its name, with everything that its result depends on.

    Returns:
        (n, D) float32 in the order of rows, on every process.
    """
    # The pixels of a source, whose fingerprint depends on labels, and not on the order.
    pixels = cache and images.lasting
    key = json.dumps(
        {
            "images": _pixel_hash(images, rows) if pixels else images.fingerprint,
            "rows": array_hash(rows),
            "extractor": [extractor.name, extractor.weights_sha256, extractor.network_sha256],
            "how": [extractor.resize, extractor.dtype, extractor.device.type, FEATURE_CHUNK],
            "transform": transform_name,
        }
    )
    path = cache_dir() / f"features-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    kept = _read_features(path, key, len(rows)) if cache and path.is_file() else None
    if all_agree(kept is not None) and kept is not None:
        return kept
    runs = own_blocks(len(rows), images.block)

    def batches() -> Iterator[NDArray[np.uint8]]:
        for run in runs:
            batch = images.read(rows[run].tolist())
            yield transform(batch) if transform else batch

    own = [number for run in runs for number in run]
    desc = " ".join(filter(None, ["features of", images.name, transform_name.partition(":")[0]]))
    part = np.empty((0, 0), np.float32)
    if own:
        part = extract_features(batches(), extractor, len(own), desc)
    features = gather_rows(part, own, len(rows))
    if cache and is_main():
        try:
            with atomic_file(path) as scratch, scratch.open("wb") as file:
                np.savez(file, features=features, key=np.array(key))
        except OSError as error:
            logger.warning("features could not be cached for the next evaluation (%s)", error)
    return features


def _pixel_hash(images: ImageSet, rows: NDArray[np.int64]) -> str:
    """Hash of the pixels in the order of rows."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), images.block):
        digest.update(images.read(rows[start : start + images.block].tolist()).tobytes())
    return digest.hexdigest()


def _read_features(path: Path, key: str, n: int) -> NDArray[np.float32] | None:
    try:
        # Opened here because np.load leaks the handle of a broken zip.
        with open_regular(path) as handle, np.load(handle, allow_pickle=False) as file:
            features: NDArray[np.float32] = file["features"]
            if str(file["key"]) == key and len(features) == n:
                return features
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s is not readable (%s): features are computed again", path, error)
    return None
