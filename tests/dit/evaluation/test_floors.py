"""Floors: images after the VAE, and images without structure."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from complexity_dit.evaluation.breakdown import VAE_CHUNK, shrink, vae_reconstruction
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from support.pictures import noise


@pytest.fixture(params=["kl", "tiny"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKL | AutoencoderTiny:
    torch.manual_seed(0)
    if request.param == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
        ).eval()  # fmt: skip
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
    ).eval()  # fmt: skip


def test_reconstructions_equal_the_vae_without_noise(
    pipe: ComplexityDiTPipeline, vae: AutoencoderKL | AutoencoderTiny
) -> None:
    pipe.vae = vae
    transform, name = vae_reconstruction(pipe)
    assert name.startswith(f"vae: {type(vae).__name__} ")
    images = noise(VAE_CHUNK + 3, 16)
    got = transform(images)
    x = torch.from_numpy(images[:VAE_CHUNK]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        found = vae.encode(x)
        latents = found.latents if isinstance(vae, AutoencoderTiny) else found.latent_dist.mode()
        expected = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).byte()
    difference = got[:VAE_CHUNK].astype(int) - expected.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(difference).max() <= 1
    assert got.shape == images.shape
    # Each image is independent of the others in its batch.
    np.testing.assert_array_equal(transform(images[:3]), got[:3])
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert vae_reconstruction(pipe)[1] != name


def test_shrinking_keeps_colours_and_removes_structure() -> None:
    images = noise(3, 32)
    small = shrink(images)
    assert small.shape == images.shape
    assert small.dtype == np.uint8
    np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)), atol=2)
    assert small.std((1, 2)).mean() < images.std((1, 2)).mean() / 2
    flat = np.full((1, 16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(shrink(flat), flat)
