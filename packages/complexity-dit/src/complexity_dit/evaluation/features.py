"""From images to features: fixed network chunks, and a cache on disk for images that stay."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from complexity_dit.distributed import all_agree, gather_rows, is_main, own_blocks
from complexity_dit.evaluation.image_sets import ImageSet
from complexity_dit.evaluation.networks import FeatureExtractor, cache_dir
from complexity_dit.hashing import array_hash
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file

logger = logging.getLogger(__name__)

FEATURE_CHUNK = 32
"""Images in one call of the feature network; the last chunk is padded to it."""


def extract_features(
    batches: Iterable[NDArray[np.uint8]],
    extractor: FeatureExtractor,
    total: int | None = None,
    desc: str = "features",
) -> NDArray[np.float32]:
    """Features of images, the same whatever the batches.

    Args:
        batches: uint8 (n, H, W, 3) arrays, any n, one H and W.
        extractor: The network.
        total: Number of images, for the progress bar.
        desc: Its text.

    Returns:
        (N, D) float32 in the order of the images.

    Raises:
        UserError: No image at all, or batches that are not uint8 (n, H, W, 3) of one size.
    """
    features: list[NDArray[np.float32]] = []
    pending: list[NDArray[np.uint8]] = []
    held, shape = 0, None

    def run(images: NDArray[np.uint8]) -> None:
        n = len(images)
        # A convolution may sum in another order for another batch size: always FEATURE_CHUNK.
        padded = np.concatenate(
            [images, np.zeros((FEATURE_CHUNK - n, *images.shape[1:]), np.uint8)]
        )
        tensor = torch.from_numpy(padded).permute(0, 3, 1, 2).contiguous()
        features.append(extractor(tensor)[:n].numpy())
        bar.update(n)

    with tqdm(total=total, desc=desc, unit="image", disable=not is_main()) as bar:
        for batch in batches:
            if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
                raise UserError(
                    f"images are {batch.dtype} of shape {batch.shape}; expected uint8 (n, H, W, 3)"
                )
            shape = shape or batch.shape[1:]
            if batch.shape[1:] != shape:
                raise UserError(f"images of {batch.shape[1:]} and of {shape}; make them one size")
            pending.append(batch)
            held += len(batch)
            if held >= FEATURE_CHUNK:
                images = np.concatenate(pending)
                whole = held - held % FEATURE_CHUNK
                for start in range(0, whole, FEATURE_CHUNK):
                    run(images[start : start + FEATURE_CHUNK])
                pending, held = [images[whole:]], held - whole
        if held:
            run(np.concatenate(pending))
    if not features:
        raise UserError("no images to take features of")
    return np.concatenate(features)


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
    """Features of some images of a set, through the cache on disk when it may be used.

    With several processes each takes blocks of whole network calls, so that every image is at the
    same place of the same call whatever their number.

    Args:
        images: The set.
        rows: Numbers of the images (n,).
        extractor: The network.
        cache: Whether features may be read from and written to the user's cache folder.
        transform: Changes uint8 (n, H, W, 3) images first.
        transform_name: What it is, with all that its result depends on.

    Returns:
        (n, D) float32 in the order of rows, on every process.
    """
    key = json.dumps(
        {
            "images": images.fingerprint,
            "rows": array_hash(rows),
            "extractor": [extractor.name, extractor.weights_sha256, extractor.spatial_dim],
            "how": [extractor.resize, extractor.dtype, extractor.device.type, FEATURE_CHUNK],
            "transform": transform_name,
            "pixels": _pixel_hash(images, rows) if cache and images.lasting else "",
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
    what = transform_name.partition(":")[0]
    desc = " ".join(filter(None, ["features of", images.name, what]))
    part = np.empty((0, 0), np.float32)
    if own:
        part = extract_features(batches(), extractor, len(own), desc)
    features = gather_rows(part, own, len(rows))
    if cache and is_main():
        try:
            with atomic_file(path) as scratch:
                np.savez(scratch, features=features, key=np.array(key))
        except OSError as error:
            logger.warning("features could not be kept for the next evaluation (%s)", error)
    return features


def _pixel_hash(images: ImageSet, rows: NDArray[np.int64]) -> str:
    """Of the pixels in the order of rows: a source's fingerprint does not say its order."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), images.block):
        digest.update(images.read(rows[start : start + images.block].tolist()).tobytes())
    return digest.hexdigest()


def _read_features(path: Path, key: str, n: int) -> NDArray[np.float32] | None:
    try:
        # Opened here because np.load leaks the handle of a broken zip.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            features: NDArray[np.float32] = file["features"]
            if str(file["key"]) == key and len(features) == n:
                return features
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s is not readable (%s): features are computed again", path, error)
    return None
