"""Labels, floors and nearest training images."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from complexity_dit.evaluation.breakdown import (
    VAE_CHUNK,
    class_means,
    memorisation,
    nearest_class_mean_accuracy,
    shrink,
    vae_reconstruction,
)
from complexity_dit.pipelines.pipeline import ComplexityDiTPipeline
from inl_core.run.errors import UserError
from support.pictures import noise


def test_missing_labels_are_left_out() -> None:
    x = np.array([[0.0, 0], [2, 0], [10, 0], [10, 4], [99, 99]])
    labels = np.array([0, 0, 3, 3, -1])
    means = class_means(x, labels)
    assert sorted(means) == [0, 3]
    np.testing.assert_array_equal(means[3], [10, 2])
    probe = np.array([[1.0, 1], [9, 1], [9, 0], [50, 50], [0, 0]])
    asked = np.array([0, 3, 0, -1, 7])
    # correct, correct, wrong, left out, wrong (a class without a mean)
    assert nearest_class_mean_accuracy(probe, asked, means) == 0.5
    with pytest.raises(UserError, match="no image has a label"):
        class_means(x, np.full(5, -1))
    with pytest.raises(UserError, match=r"labels \(2,\)"):
        class_means(x, np.array([0, 1]))


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
    transform, name = vae_reconstruction(vae)
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
    assert vae_reconstruction(vae)[1] != name


def test_shrinking_keeps_colours_and_removes_structure() -> None:
    images = noise(3, 32)
    small = shrink(images)
    assert small.shape == images.shape
    assert small.dtype == np.uint8
    np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)), atol=2)
    assert small.std((1, 2)).mean() < images.std((1, 2)).mean() / 2
    flat = np.full((1, 16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(shrink(flat), flat)


def features(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, 12)) + shift).astype(np.float32)


def test_new_samples_resemble_held_out_images() -> None:
    found = memorisation(features(400, 1), features(400, 2), features(300, 0))
    assert found.probability_closer == pytest.approx(0.5, abs=0.05)
    assert found.closer_than_1_percent < 0.04
    # The probability by its definition.
    a, b = found.samples[:, None], found.heldout[None]
    assert found.probability_closer == pytest.approx(((a < b) + (a == b) / 2).mean(), rel=1e-12)


def test_copies_are_listed_nearest_first() -> None:
    train, samples = features(300, 0), features(100, 1)
    samples[7] = train[42]
    samples[8] = train[42]  # two copies of one image give one pair
    samples[30] = train[5] + np.float32(0.01)
    found = memorisation(samples, features(100, 2), train)
    assert [pair[:2] for pair in found.pairs[:2]] == [(7, 42), (30, 5)]
    assert found.pairs[0][2] == 0
    distances = [pair[2] for pair in found.pairs]
    assert distances == sorted(distances)
    assert len({pair[1] for pair in found.pairs}) == 16
    assert found.closer_than_1_percent >= 0.03
    summary = found.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["closest_pairs"][0] == {"sample": 7, "training_image": 42, "distance": 0.0}
    assert summary["quantiles"]["samples"]["0"] == 0
