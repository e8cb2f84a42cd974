"""PSNR, the spectrum and the rank of latents, against what they are by definition."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from complexity_dit.evaluation.autoencoder import latent_statistics, psnr
from inl_core.run.errors import UserError
from support.pictures import noise


def test_psnr_is_that_of_torchmetrics_per_picture():
    images = noise(4, 8)
    others = np.roll(images, 1, axis=0)
    expected = [
        float(peak_signal_noise_ratio(torch.from_numpy(b.astype(np.float64)),
                                      torch.from_numpy(a.astype(np.float64)), data_range=255.0))
        for a, b in zip(images, others, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(psnr(images, others), expected, rtol=1e-6)
    assert np.isfinite(psnr(images, images)).all()


def test_white_noise_has_a_flat_spectrum_and_full_rank():
    z = np.random.default_rng(0).normal(2.0, 3.0, (1024, 4, 8, 8))
    found = latent_statistics(z)
    np.testing.assert_allclose(found["spectrum"], 1, atol=0.1)
    assert found["effective_rank"] == pytest.approx(4, abs=0.05)
    assert (found["mean"], found["std"]) == pytest.approx((2, 3), abs=0.1)


def test_the_spectrum_finds_a_single_frequency():
    place = np.arange(8) + 0.5
    wave = np.cos(np.pi / 8 * 3 * place)  # third frequency across, constant down
    amplitudes = np.random.default_rng(0).normal(size=(32, 1, 1, 1))
    found = latent_statistics(amplitudes * np.broadcast_to(wave, (32, 1, 8, 8)))
    power = np.array(found["spectrum"])
    assert power[3] > 0
    assert power[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-9


def test_equal_channels_have_rank_one():
    one = np.random.default_rng(0).normal(size=(16, 1, 4, 4))
    assert latent_statistics(np.repeat(one, 6, axis=1))["effective_rank"] == pytest.approx(1)


def test_constant_latents_are_refused():
    with pytest.raises(UserError, match="the same everywhere"):
        latent_statistics(np.ones((4, 2, 4, 4)))
