"""Clusters of pictures as a label field."""

from pathlib import Path

import numpy as np
import pytest
import torch

from complexity_dit.config import DataConfig
from complexity_dit.data.clusters import (
    CLUSTER_FIELD,
    features,
    fit_clusters,
    k_means,
    nearest_clusters,
    read_clusters,
    save_clusters,
    with_clusters,
)
from complexity_dit.data.dataset import load_data
from complexity_dit.seeding import generator_for
from inl_core.run.errors import UserError
from support.pictures import write_folder

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])


@pytest.fixture
def unlabelled(tmp_path: Path) -> DataConfig:
    """90 pictures of three colours, each with noise of its own."""
    draw = np.random.default_rng(0)
    noise = draw.integers(-20, 20, (90, 16, 16, 3))
    images = (COLOURS[np.arange(90) % 3][:, None, None] + noise).astype(np.uint8)
    folder = write_folder(tmp_path / "folder", images)
    return DataConfig(source=f"imagefolder:{folder}", resolution=16, holdout=0.3, clusters=3)


def colour_of(data) -> torch.Tensor:
    return data.pixels(range(len(data))).float().mean((2, 3)).argmax(1)


def test_clusters_are_those_of_the_pictures_and_held_out_ones_get_the_nearest(unlabelled) -> None:
    train, heldout = (load_data(unlabelled, split) for split in ("train", "heldout"))
    centres = fit_clusters(train, 3, seed=0)
    assert torch.equal(centres, fit_clusters(train, 3, seed=0))
    of_colour = {}
    for data in (train, heldout):
        ids = nearest_clusters(data, centres)
        clustered = with_clusters(data, centres, ids)
        assert clustered.label_names == {CLUSTER_FIELD: ["0", "1", "2"]}
        assert torch.equal(clustered.labels[:, 0], ids)
        assert clustered.fingerprint != data.fingerprint
        assert data.label_names == {}  # the data themselves stay as they were
        for colour, number in zip(colour_of(data).tolist(), ids.tolist(), strict=True):
            assert of_colour.setdefault(colour, number) == number
    assert sorted(of_colour.values()) == [0, 1, 2]
    other = with_clusters(train, centres + 1, nearest_clusters(train, centres))
    assert (
        other.fingerprint
        != with_clusters(train, centres, ids[:0].new_zeros(len(train))).fingerprint
    )


def test_a_mirror_image_has_the_cluster_of_its_picture(unlabelled, monkeypatch) -> None:
    train = load_data(unlabelled, "train")
    found = features(train, torch.arange(4))
    clean = train.clean
    monkeypatch.setattr(train, "clean", lambda *arguments: clean(*arguments).flip(-1))
    torch.testing.assert_close(features(train, torch.arange(4)), found)
    assert found.shape == (4, 3 * 8 * 4)


def test_k_means_finds_what_lloyds_algorithm_must() -> None:
    draw = torch.Generator().manual_seed(0)
    groups = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10], [20, 20]]).double()
    points = groups.repeat(40, 1) + 0.1 * torch.randn(200, 2, generator=draw).double()
    centres = k_means(points, 5, generator_for(0, "test"))
    means = points.view(40, 5, 2).mean(0)
    torch.testing.assert_close(centres[torch.cdist(groups, centres).argmin(1)], means)


def test_more_clusters_than_different_pictures_are_refused(unlabelled, tmp_path) -> None:
    train = load_data(unlabelled, "train")
    count = len(train)
    assert len(fit_clusters(train, count, seed=0)) == count
    with pytest.raises(UserError, match=rf"clusters {count + 1}: .*only {count} different"):
        fit_clusters(train, count + 1, seed=0)
    same = np.zeros((6, 16, 16, 3), np.uint8)
    folder = write_folder(tmp_path / "same", same)
    data = load_data(DataConfig(f"imagefolder:{folder}", resolution=16, holdout=0.0), "all")
    with pytest.raises(UserError, match=r"only 1 different pictures; set --data.clusters to 1"):
        fit_clusters(data, 2, seed=0)


def test_centres_are_read_as_they_were_saved(tmp_path) -> None:
    centres = torch.randn(3, 4)
    save_clusters(centres, tmp_path)
    assert torch.equal(read_clusters(tmp_path, 3), centres)
    with pytest.raises(UserError, match=r"shape \(3, 4\): set --data.clusters 3"):
        read_clusters(tmp_path, 4)
    (tmp_path / "clusters.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot read"):
        read_clusters(tmp_path, 3)
    (tmp_path / "clusters.safetensors").unlink()
    with pytest.raises(UserError, match=r"has lost its clusters\.safetensors"):
        read_clusters(tmp_path, 3)


def test_other_data_and_a_field_of_that_name_are_refused(unlabelled) -> None:
    train = load_data(unlabelled, "train")
    centres = fit_clusters(train, 2, seed=0)
    ids = nearest_clusters(train, centres)
    with pytest.raises(UserError, match="a label field 'cluster' already"):
        with_clusters(with_clusters(train, centres, ids), centres, ids)
    with pytest.raises(
        UserError, match="clusters are of 12 numbers a picture, and these data have 96"
    ):
        nearest_clusters(train, centres[:, :12])
