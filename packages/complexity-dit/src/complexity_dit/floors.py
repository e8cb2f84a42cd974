"""Distances that a perfect generator has too: of training images, of the VAE's round trip.

The same real images serve as reference at the same n, so that a floor stands beside the number it
belongs to.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from complexity_dit.hashing import module_hash

if TYPE_CHECKING:
    from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline

Transform = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

SHRUNK_SIZE = 8
SHRUNK_FILTER = "area mean down to 8x8, bicubic up, rounded to uint8"
VAE_CHUNK = 8
"""Images in one call of the VAE; the last one is padded to it."""


def shrink(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images shrunk to 8 x 8 and back (`SHRUNK_FILTER`): colours stay, structure goes.

    Args:
        images: uint8 (n, H, W, 3).

    Returns:
        uint8 of the same shape.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = F.interpolate(x, (SHRUNK_SIZE, SHRUNK_SIZE), mode="area")
    back = F.interpolate(small, x.shape[2:], mode="bicubic", align_corners=False)
    return _to_uint8(back)


def vae_reconstruction(pipe: "ComplexityDiTPipeline") -> tuple[Transform, str]:
    """The VAE's round trip, without noise: the best that any model of its latents can paint.

    Args:
        pipe: A pipeline with a VAE of diffusers' interface: ``encode(x)`` gives ``latents`` or a
            ``latent_dist`` (whose mean is taken), ``decode(z)`` a ``sample``; x in [-1, 1].

    Returns:
        The transform of uint8 (n, H, W, 3), and its name with the VAE's hash.
    """
    vae: Any = pipe.vae
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
