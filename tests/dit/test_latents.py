"""Cached latents: encoded once, resumed exactly, trained on, sampled from, and every bad cache."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from complexity_dit.autoencoder import TinyAutoencoder
from complexity_dit.config import TrainConfig
from complexity_dit.data import DataConfig, load_data
from complexity_dit.encode import encode
from complexity_dit.evaluate import EvalConfig, evaluate
from complexity_dit.pipeline import ComplexityDiTPipeline
from complexity_dit.sample import SampleConfig
from complexity_dit.train import train

IMAGES = 24


@pytest.fixture(scope="module")
def paintings(tmp_path_factory) -> Path:
    """Pictures of 16 px in two folders, which are their labels."""
    folder = tmp_path_factory.mktemp("paintings")
    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        style = folder / ("Cubism" if i % 2 else "Fauvism")
        style.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            style / f"{i:02}.png"
        )
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> str:
    """A small AutoencoderKL with random weights: 2 times smaller, 4 channels, a real posterior."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("kl")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A small TinyAutoencoder with random weights: 4 times smaller, 6 channels."""
    torch.manual_seed(1)
    vae = TinyAutoencoder(
        latent_channels=6, block_out_channels=(8, 8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), pool_channels=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def source(paintings, tiny) -> DataConfig:
    return DataConfig(source=f"imagefolder:{paintings}", resolution=16, holdout=0.25, vae=tiny)


def as_latents(source: DataConfig, cache: Path) -> DataConfig:
    return dataclasses.replace(source, source=f"latents:{cache}", vae=None)


def short_run(data: DataConfig, out: Path) -> TrainConfig:
    config = TrainConfig(out=str(out), steps=4, batch_size=4, log_every=2, checkpoint_every=4)
    shape = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    model = dataclasses.replace(config.model, patch_size=2, overrides=shape)
    return dataclasses.replace(config, data=data, model=model)


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_encode_train_sample_evaluate(kind, request, source, paintings, tmp_path):
    source = dataclasses.replace(source, vae=request.getfixturevalue(kind))
    cache = encode(source, tmp_path / "cache", batch_size=4, part_size=10)
    folder = train(short_run(as_latents(source, cache), tmp_path / "run"))
    pipe = ComplexityDiTPipeline.from_pretrained(folder)
    assert pipe.sample_size == 16
    result = evaluate(
        folder, f"imagefolder:{paintings}", None,
        EvalConfig(num_images=4, weights="random", quiet=True, cache=False, kid_subsets=2),
        SampleConfig(num_inference_steps=1),
    )  # fmt: skip
    assert result["settings"]["data"]["holdout"] == 0.25
    held_out = load_data(dataclasses.replace(source, vae=None), "heldout")
    assert result["reference_fingerprint"] == held_out.fingerprint
