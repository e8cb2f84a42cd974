"""Measures of an autoencoder on held-out pictures: PSNR, FID of reconstructions, its latents."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from complexity_dit.config import DataConfig, EvalConfig
from complexity_dit.data.dataset import PaintingDataset, load_data
from complexity_dit.distributed import main_first, pick_device
from complexity_dit.evaluation.breakdown import vae_reconstruction
from complexity_dit.evaluation.evaluate import measure, package_versions
from complexity_dit.evaluation.features import FEATURE_CHUNK, draw, set_features
from complexity_dit.evaluation.image_sets import dataset_images
from complexity_dit.evaluation.networks import load_extractor
from complexity_dit.grids import save_grid
from complexity_dit.hashing import weights_sha256
from complexity_dit.models.vae import posterior, scale_factor
from inl_core.run.errors import UserError

STRIP_IMAGES = 8
"""Pictures in a strip of reconstructions."""


def evaluate_autoencoder(vae: Any, data: DataConfig, config: EvalConfig) -> dict[str, Any]:
    """Measure how well an autoencoder gives back held-out pictures of a source.

    Args:
        vae: The autoencoder, in eval mode.
        data: The source, its resolution and the share that is held out.
        config: Number of pictures, and the feature network.

    All processes of a run call it together.

    Returns:
        What `result.json` holds: ``metrics`` (``psnr`` in dB, the mean over pictures, and the
        distances of `measure` between reconstructions and the pictures they are of: ``fid``, which
        is called rFID, or ``fd_random``), ``latents`` (see `latent_statistics`), ``n_generated``,
        ``n_reference``, ``settings``, ``versions``, ``weights_sha256`` of the feature network, and
        ``reference_fingerprint``.

    Raises:
        UserError: Fewer than 2 held-out pictures, or the source or the network cannot be used.
    """
    heldout = main_first(lambda: load_data(data, "heldout"))
    rows = draw(len(heldout), config.num_images, config.seed)
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} held-out picture of {data.source}: a distance needs 2 or more; raise "
            f"data.holdout {data.holdout} or num_images {config.num_images}"
        )
    device = pick_device(config.device)
    vae = vae.to(device)
    extractor = main_first(
        lambda: load_extractor(config.weights, config.resize, config.dtype, device)
    )
    images = dataset_images(heldout, f"{data.source} heldout")
    transform, name = vae_reconstruction(vae)
    reconstructed = set_features(images, rows, extractor, config.cache, transform, name)
    found = measure(
        reconstructed, set_features(images, rows, extractor, config.cache), extractor, config
    )
    ratios = np.concatenate([
        psnr(truth, transform(truth))
        for start in range(0, len(rows), FEATURE_CHUNK)
        for truth in [images.read(rows[start : start + FEATURE_CHUNK].tolist())]
    ])  # fmt: skip
    result = {
        "metrics": {"psnr": float(ratios.mean()), **found.metrics},
        "absent": found.absent,
        "latents": latent_statistics(encoded(vae, heldout, rows)),
        "n_generated": len(rows),
        "n_reference": len(rows),
        "settings": {
            "target": name,
            "reference": data.source,
            "eval": asdict(config),
            "data": asdict(data),
            "extractor": {
                **extractor.identity,
                "weights_source": extractor.weights_source,
                "device": device.type,
                "chunk": FEATURE_CHUNK,
            },
            **found.settings,
        },
        "autoencoder_sha256": weights_sha256(vae),
        "versions": package_versions(),
        "weights_sha256": extractor.weights_sha256,
        "reference_fingerprint": heldout.fingerprint,
    }
    return json.loads(json.dumps(result, allow_nan=False))


def psnr(truth: NDArray[np.uint8], images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of uint8 pictures (n, H, W, 3): (n,).

    Equal pictures count as if one value differed by one.
    """
    errors = (truth.astype(np.float64) - images).reshape(len(truth), -1)
    mean = np.maximum((errors**2).mean(1), 1 / errors.shape[1])
    return 10 * np.log10(255**2 / mean)


@torch.inference_mode()
def encoded(
    vae: Any, pictures: PaintingDataset, rows: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float32]:
    """Latents of some pictures of a split, (n, C, Y, X): means, where there is a posterior."""
    parts, first = [], next(vae.parameters())
    for start in range(0, len(rows), FEATURE_CHUNK):
        indices = torch.as_tensor(rows[start : start + FEATURE_CHUNK])
        images = pictures.clean(indices, torch.zeros(len(indices), dtype=torch.bool))
        mean, _ = posterior(vae, images.to(first.device, first.dtype))
        parts.append(mean.float().cpu().numpy())
    return np.concatenate(parts)


def latent_statistics(latents: NDArray[np.floating]) -> dict[str, Any]:
    """Describe latents (n, C, Y, X) as the input of a diffusion model.

    Returns:
        ``mean`` and ``std`` over everything; ``effective_rank``, the exponential of the entropy of
        the eigenvalues of the channels' covariance (Roy & Vetterli, 2007), at most C; and
        ``spectrum``: mean power of the coefficients of an orthonormal DCT at each radius of
        frequency, 0 to 1 in steps of 1/Y, in units of the variance. A picture's power falls with
        the frequency; latents whose power does not are harder to generate.
    """
    x = np.asarray(latents, np.float64)
    count, channels, height, width = x.shape
    centred = x - x.mean((0, 2, 3), keepdims=True)
    flat = centred.transpose(1, 0, 2, 3).reshape(channels, -1)
    variance = float((flat**2).mean())
    if not variance > 0:
        raise UserError("the latents are the same everywhere: the autoencoder has learned nothing")
    values = np.linalg.eigvalsh(flat @ flat.T / flat.shape[1]).clip(min=0)
    shares = values[values > 0] / values.sum()
    power = np.zeros((height, width))
    for part in np.array_split(centred, -(-count // 64)):
        power += ((_dct(height) @ part @ _dct(width).T) ** 2).sum((0, 1))
    power /= count * channels * variance
    rows, columns = np.arange(height)[:, None] / height, np.arange(width) / width
    radius = np.round(np.hypot(rows, columns) * height).astype(int)
    bins = [power[radius == i].mean() for i in range(height)]
    return {
        "mean": float(x.mean()),
        "std": float(x.std()),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "channels": channels,
        "spectrum": [float(value) for value in bins],
    }


def _dct(n: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II as a matrix (n, n)."""
    frequency, place = np.arange(n)[:, None], np.arange(n) + 0.5
    matrix = np.sqrt(2 / n) * np.cos(np.pi / n * frequency * place)
    matrix[0] /= np.sqrt(2)
    return matrix


def save_strip(vaes: dict[str, Any], data: DataConfig, path: Path, seed: int = 0) -> None:
    """Write held-out pictures and, below them, what each autoencoder (by caption) makes of them."""
    heldout = load_data(data, "heldout")
    rows = draw(len(heldout), STRIP_IMAGES, seed).tolist()
    truth = dataset_images(heldout, "heldout").read(rows)
    strips = [truth, *(vae_reconstruction(vae)[0](truth) for vae in vaes.values())]
    save_grid(np.concatenate(strips), len(rows), ["held-out", *vaes], path)


def check_size(vae: Any, **sizes: int | None) -> None:
    """Raise a `UserError` for a size in pixels that is not a multiple of the factor of a VAE."""
    factor = scale_factor(vae)
    for name, size in sizes.items():
        if size is not None and size % factor:
            raise UserError(
                f"{name} {size} must be a multiple of {factor}, the factor by which latents are "
                "smaller"
            )
