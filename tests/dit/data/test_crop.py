"""Random crops of training pictures: where they lie, and that they are a function of the step."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from complexity_dit.config import DataConfig, TrainConfig
from complexity_dit.data.dataset import PaintingDataset, load_data
from complexity_dit.data.encode import encode
from complexity_dit.data.latents import load_training_data
from complexity_dit.evaluation.image_sets import open_reference
from complexity_dit.training.batches import StepBatches
from inl_core.run.errors import UserError
from support.pictures import random_image

SIDE = 8


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Pictures of the shorter side 8: wide, high and square, so that none is scaled."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for i, size in enumerate([(13, 8), (8, 11), (8, 8), (40, 8)]):
        random_image(i, *size).save(tmp_path / "set" / f"{i}.png")
    source = f"imagefolder:{tmp_path / 'set'}"
    return DataConfig(source, resolution=SIDE, holdout=0.0, flip=False, crop="random")


def squares(index: int, size: tuple[int, int]) -> list[np.ndarray]:
    """All squares of a picture, from one end of its longer side to the other."""
    picture = np.asarray(random_image(index, *size)).transpose(2, 0, 1)
    across = picture.shape[2] > SIDE
    return [
        picture[:, :, i : i + SIDE] if across else picture[:, i : i + SIDE]
        for i in range(max(size) - SIDE + 1)
    ]


@pytest.mark.parametrize(("index", "size"), [(0, (13, 8)), (1, (8, 11)), (2, (8, 8)), (3, (40, 8))])
def test_a_crop_lies_anywhere_along_the_longer_side(config, index: int, size) -> None:
    data = load_data(config, "train")
    expected = squares(index, size)
    for number, square in enumerate(expected):
        for place in (number / len(expected) + 1e-6, (number + 1) / len(expected) - 1e-6):
            found = data.pixels([index], torch.tensor([place], dtype=torch.float64))[0]
            np.testing.assert_array_equal(found, square)
    np.testing.assert_array_equal(data.pixels([index])[0], expected[len(expected) // 2])


def test_a_crop_is_a_function_of_seed_and_step(config) -> None:
    train = TrainConfig(data=config, batch_size=4, steps=40, report_to="none")
    data = load_data(config, "train")

    def batch(step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        return StepBatches(data, train, rank, world)[step]["x"]

    steps = [batch(step) for step in range(3)]
    assert all(torch.equal(batch(step), x) for step, x in enumerate(steps))
    for rank in (0, 1):
        assert torch.equal(batch(1, rank, 2), steps[1][rank::2])
    middle = StepBatches(data, replace(train, data=replace(config, crop="center")), 0, 1)[1]
    drawn = StepBatches(data, train, 0, 1)[1]
    assert torch.equal(drawn["timestep"], middle["timestep"])
    assert torch.equal(drawn["labels"], middle["labels"])
    assert not torch.equal(drawn["x"], middle["x"])


def test_every_place_is_drawn_equally_often(config, monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(data=config, batch_size=4, steps=400, report_to="none")
    data, places = load_data(config, "train"), []
    original = PaintingDataset.clean

    def note(self, indices, flips, noise=None, shifts=None):
        assert shifts is not None
        places.extend(shifts.tolist())
        return original(self, indices, flips, noise, shifts)

    monkeypatch.setattr(PaintingDataset, "clean", note)
    batches = StepBatches(data, train, 0, 1)
    for step in range(400):
        batches[step]
    counts = np.histogram(places, bins=4, range=(0, 1))[0]
    assert counts.sum() == 1600
    assert counts.min() > 330  # 400 each; 70 are four standard deviations


def test_evaluation_takes_the_middle(config) -> None:
    config = replace(config, holdout=0.6)
    reference = open_reference(config.source, (SIDE, SIDE), config)
    assert reference.images is not None
    assert reference.data == replace(config, crop="center")
    middle = load_data(replace(config, crop="center"), "heldout")
    assert reference.images.fingerprint == middle.fingerprint


def test_latents_have_one_crop(config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"crop is random, and latents are encoded once"):
        encode(replace(config, vae="anything"), tmp_path / "latents")
    with pytest.raises(UserError, match="crop is 'left'; expected one of 'center', 'random'"):
        DataConfig(crop="left")


def test_the_art_set_is_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    art = DataConfig(resolution=8, num_images=4, holdout=0.0)
    drawn = load_training_data(replace(art, crop="random"))
    assert isinstance(drawn, PaintingDataset)
    same = load_data(art, "train").pixels(range(4))
    assert torch.equal(drawn.pixels(range(4), torch.rand(4)), same)
