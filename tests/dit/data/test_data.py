"""The three sources, the held-out split, labels, unusable images and refused settings."""

import csv
import dataclasses
import logging
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from complexity_dit.config import DataConfig
from complexity_dit.data import art, sources
from complexity_dit.data import dataset as data
from complexity_dit.data.dataset import PaintingDataset, load_data
from complexity_dit.labels import resolve_label
from complexity_dit.pictures import square_pixels
from inl_core.run.errors import UserError
from support.data import needs_data, shared_data
from support.pictures import encoded, random_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures with metadata: two styles, five artists with a gap each, unique titles."""
    root = tmp_path / "paintings"
    root.mkdir()
    with open(root / "metadata.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["file_name", "style", "artist", "title", "year"])
        for i in range(40):
            random_image(i).save(root / f"{i:02}.png")
            artist = "" if i % 8 == 7 else f"painter {i % 5}"
            year = "" if i == 3 else 1900 + i % 2
            out.writerow([f"{i:02}.png", ["Cubism", "Baroque"][i % 2], artist, f"no {i}", year])
    return root


def load(root: Path, split: str = "all", **settings: object) -> PaintingDataset:
    return load_data(DataConfig(source=f"imagefolder:{root}", resolution=8, **settings), split)


def contents(dataset: PaintingDataset) -> set[bytes]:
    return {pixels.numpy().tobytes() for pixels in dataset.pixels(range(len(dataset)))}


def test_a_folder_with_metadata_gives_pictures_and_labels(folder: Path) -> None:
    dataset = load(folder)
    assert len(dataset) == 40
    assert dataset.label_names == {
        "style": ["Baroque", "Cubism"],
        "artist": [f"painter {i}" for i in range(5)],
    }
    assert dataset.labels.shape == (40, 2)
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels[:8].tolist() == [
        [1, 0], [0, 1], [1, 2], [0, 3], [1, 4], [0, 0], [1, 1], [0, -1],
    ]  # fmt: skip
    item = dataset[5]
    assert item["pixel_values"].dtype == torch.uint8
    assert item["pixel_values"].shape == (3, 8, 8)
    expected = square_pixels((folder / "05.png").read_bytes(), 8)
    assert np.array_equal(item["pixel_values"].numpy(), expected)
    assert torch.equal(item["labels"], dataset.labels[5])
    assert torch.equal(dataset.pixels([5, 3])[0], item["pixel_values"])
    with pytest.raises(IndexError):
        dataset[40]


def test_class_folders_give_a_class_label(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "set" / ["dog", "ant"][i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(i).save(path)
    dataset = load(tmp_path / "set")
    assert dataset.label_names == {"label": ["ant", "dog"]}
    assert sorted(dataset.labels[:, 0].tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        random_image(i).save(tmp_path / f"{i}.png")
    dataset = load(tmp_path)
    assert dataset.label_names == {}
    assert dataset.labels.shape == (3, 0)
    assert dataset[0]["labels"].shape == (0,)


def test_file_names_that_resemble_splits_are_read(tmp_path: Path) -> None:
    root = tmp_path / "set [1]"
    root.mkdir()
    for name in ("the-train-in-the-snow", "plain", "test-of-colour"):
        random_image(len(name)).save(root / f"{name}.png")
    assert len(load(root)) == 3


def test_train_and_test_folders_are_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, (split, name) in enumerate([("train", "a"), ("train", "b"), ("test", "a")]):
        path = tmp_path / "set" / split / name / f"{i}.png"
        path.parent.mkdir(parents=True)
        random_image(i).save(path)
    with caplog.at_level(logging.INFO):
        dataset = load(tmp_path / "set")
    assert len(dataset) == 3
    assert dataset.label_names == {"label": ["a", "b"]}
    assert "joining its splits test, train" in caplog.text


def test_pictures_in_a_zip_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", encoded(random_image(i)))
    assert len(load(tmp_path)) == 3


def parquet(tmp_path: Path) -> Path:
    """A data set like huggan/wikiart: encoded images with ClassLabel columns, in two splits."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "artist": datasets.ClassLabel(names=["z", "a", "m"]),
            "genre": datasets.ClassLabel(names=["landscape", "portrait"]),
        }
    )
    root = tmp_path / "hub"
    root.mkdir()
    for split, count in (("train", 6), ("test", 3)):
        rows = {
            "image": [
                {"bytes": encoded(random_image(i + count)), "path": None} for i in range(count)
            ],
            "artist": [i % 3 for i in range(count)],
            "genre": [None if i == 0 else 1 for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            root / f"{split}-00000-of-00001.parquet"
        )
    return root


def test_a_hub_dataset_keeps_its_class_labels_and_joins_its_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(source=f"hub:{parquet(tmp_path)}", resolution=8)
    with caplog.at_level(logging.INFO):
        dataset = load_data(config, "all")
    assert len(dataset) == 9
    assert dataset.label_names == {"artist": ["z", "a", "m"], "genre": ["landscape", "portrait"]}
    assert dataset.labels[:3].tolist() == [[0, -1], [1, 1], [2, 1]]
    assert "joining its splits train (6), test (3)" in caplog.text


def test_the_art_set_has_the_same_split_at_every_resolution() -> None:
    small = DataConfig(source="art", num_images=48, resolution=8, holdout=0.3)
    large = dataclasses.replace(small, resolution=12)
    heldout, everything = load_data(small, "heldout"), load_data(small, "all")
    assert 0 < len(heldout) < 48
    assert torch.equal(heldout.labels, load_data(large, "heldout").labels)
    assert everything.label_names == {
        field: list(names) for field, names in art.LABEL_NAMES.items()
    }
    assert everything.labels[7].tolist() == list(art.labels_of(7).values())
    drawn = np.asarray(art.paint(7, 8)).transpose(2, 0, 1)
    assert np.array_equal(everything.pixels([7])[0].numpy(), drawn)


@pytest.mark.parametrize("source", ["art", "folder"])
def test_a_second_load_decodes_nothing(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "art" if source == "art" else f"imagefolder:{folder}"
    config = DataConfig(source=name, resolution=8, num_images=40)
    first = load_data(config, "train")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "_prepare_row", refuse)
    monkeypatch.setattr(sources, "_draw_row", refuse)
    again = load_data(config, "train")
    assert torch.equal(first.pixels(range(len(first))), again.pixels(range(len(again))))
    assert first.fingerprint == again.fingerprint
    with pytest.raises(AssertionError, match="decoded again"):
        load_data(dataclasses.replace(config, resolution=9), "train")


def test_memory_mapped_pixels_equal_those_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "11.png").write_bytes(b"broken")
    in_memory = load(folder, "train", holdout=0.4)
    monkeypatch.setattr(data, "RAM_LIMIT", 0)
    mapped = load(folder, "train", holdout=0.4)
    order = torch.randperm(len(mapped), generator=torch.Generator().manual_seed(0))
    assert mapped._pixels is None
    assert torch.equal(mapped.pixels(order), in_memory.pixels(order))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_several_processes_decode_the_same(folder: Path, tmp_path: Path) -> None:
    one = load(folder)
    shutil.rmtree(tmp_path / "cache")
    two = load(folder, num_workers=2)
    assert torch.equal(one.pixels(range(40)), two.pixels(range(40)))
    assert one.fingerprint == two.fingerprint


def test_the_split_depends_on_the_bytes_of_a_file(folder: Path) -> None:
    shutil.copy(folder / "00.png", folder / "01.png")
    everything = load(folder)
    for holdout in (0.3, 0.6):
        train, heldout = (load(folder, split, holdout=holdout) for split in ("train", "heldout"))
        assert len(train) + len(heldout) == len(everything) == 40
        assert not contents(train) & contents(heldout)
        assert train.label_names == heldout.label_names == everything.label_names
    fewer = load(folder, "heldout", holdout=0.3)
    assert contents(fewer) < contents(heldout)


@pytest.mark.parametrize(
    ("start", "holdout", "heldout"),
    [("0000", 0.1, True), ("1999", 0.1, True), ("199a", 0.1, False), ("0000", 0.0, False)],
)
def test_files_below_the_holdout_fraction_are_held_out(
    start: str, holdout: float, heldout: bool
) -> None:
    sha256 = start + "0" * 60
    in_splits = [data.in_split(sha256, holdout, split) for split in ("heldout", "train", "all")]
    assert in_splits == [heldout, not heldout, True]


def test_the_fingerprint_changes_with_the_data_and_its_settings(folder: Path) -> None:
    base = load(folder, "train", holdout=0.3)
    assert base.fingerprint == load(folder, "train", holdout=0.3).fingerprint
    assert len(base.fingerprint) == 64
    others = [
        load(folder, "heldout", holdout=0.3),
        load(folder, "train", holdout=0.6),
        load(folder, "train", holdout=0.3, label_fields=["style"]),
        load_data(DataConfig(f"imagefolder:{folder}", resolution=9, holdout=0.3), "train"),
    ]
    random_image(99).save(folder / "00.png")
    others.append(load(folder, "all"))
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_named_label_fields_are_used_in_their_order(folder: Path) -> None:
    dataset = load(folder, label_fields=["year", "title"])
    assert list(dataset.label_names) == ["year", "title"]
    assert dataset.label_names["year"] == ["1900", "1901"]
    assert dataset.labels[:5, 0].tolist() == [0, 1, 0, -1, 0]
    assert load(folder, label_fields=[]).label_names == {}
    with pytest.raises(UserError, match=r"'genre' is not in the data.*style, artist, title, year"):
        load(folder, label_fields=["genre"])
    with pytest.raises(UserError, match="twice"):
        load(folder, label_fields=["style", "style"])


def bad_files(root: Path) -> dict[str, str]:
    """Replace four files by unusable ones; return their names and the expected reasons."""
    intact = encoded(random_image(1, 64, 64), "JPEG")
    (root / "01.png").write_bytes(intact[: len(intact) // 2])
    (root / "02.png").write_bytes(b"not an image")
    random_image(2, width=40, height=7).save(root / "03.png")
    (root / "04.png").unlink()
    return {
        "01.png": "truncated",
        "02.png": "is not an image",
        "03.png": "40×7 pixels, smaller than the crop of 8×8",
        "04.png": "is not there",
    }


def test_bad_images_are_named_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = bad_files(folder)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        dataset = load(folder)
        assert len(dataset) == 36
        assert dataset.skipped == 4
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == 5
        for line, (name, reason) in zip(warned, expected.items(), strict=False):
            assert name in line
            assert reason in line
        assert warned[-1] == "skipped 4 of the 40 images of 'all'"
        assert dataset.labels[1].tolist() == [
            0,
            0,
        ]  # the labels of picture 05
    skipped = [load(folder, split, holdout=0.5).skipped for split in ("train", "heldout")]
    assert sum(skipped) == 4


@pytest.mark.parametrize("cached", [False, True])
def test_strict_stops_at_the_first_bad_image(folder: Path, cached: bool) -> None:
    bad_files(folder)
    if cached:
        load(folder)
    with pytest.raises(UserError, match=r"01\.png.*truncated.*strict=false skips"):
        load(folder, strict=True)


def test_a_decompression_bomb_is_skipped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    random_image(0, 30, 30).save(folder / "00.png")  # over the limit: Pillow only warns
    random_image(1, 60, 60).save(folder / "01.png")  # over twice the limit: Pillow stops
    dataset = load(folder)
    assert dataset.skipped == 2
    assert "00.png (row 0): cannot be decoded (DecompressionBombWarning" in caplog.text
    assert "01.png (row 1): cannot be decoded (DecompressionBombError" in caplog.text


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"source": "imagenet"}, "train", "source 'imagenet' must be art, imagefolder:PATH or"),
        ({"source": "imagefolder:"}, "train", "must be art"),
        ({"source": "s3:bucket"}, "train", "must be art"),
        ({"source": "imagefolder:/nowhere/at/all"}, "train", "/nowhere/at/all is not a folder"),
        ({}, "test", "split 'test' must be one of train, heldout, all"),
        ({"resolution": 0}, "train", "resolution is 0"),
        ({"holdout": 1.0}, "train", "holdout 1.0"),
        ({"holdout": -0.1}, "train", "holdout -0.1"),
        ({"holdout": float("nan")}, "train", "holdout nan"),
        ({"num_images": 0}, "train", "num_images is 0"),
        ({"num_workers": -1}, "train", "num_workers is -1"),
        ({"num_images": 4, "holdout": 0.0}, "heldout", "split 'heldout' of art is empty"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(DataConfig(**settings), split)


def test_folders_without_a_usable_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no images in"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="there are no images in"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(
        UserError, match=r"none of the 1 images of .*a\.png \(row 0\): is not an image"
    ):
        load(tmp_path)


def test_an_unusable_metadata_file_is_refused(folder: Path) -> None:
    (folder / "metadata.csv").write_text("picture,style\n00.png,Cubism\n")
    with pytest.raises(UserError, match=r"has the columns picture, style;.*file_name"):
        load(folder)


def test_the_image_column_can_be_named(tmp_path: Path) -> None:
    source = f"hub:{parquet(tmp_path)}"
    assert len(load_data(DataConfig(source, resolution=8, image_column="image"), "all")) == 9
    with pytest.raises(UserError, match=r"image columns of the data are \['image'\].*'genre' is"):
        load_data(DataConfig(source, resolution=8, image_column="genre"), "all")


def test_a_hub_source_offline_gives_one_line() -> None:
    with pytest.raises(UserError, match="imagefolder:PATH") as caught:
        load_data(DataConfig("hub:huggan/wikiart"), "train")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9 .*imagefolder:PATH"):
        load_data(DataConfig("hub:huggan/wikiart"), "train")


@pytest.mark.slow
@needs_data
def test_the_wikiart_subset() -> None:
    source = f"imagefolder:{shared_data()}/wikiart"
    config = DataConfig(source, resolution=48, holdout=0.2)
    train, heldout = load_data(config, "train"), load_data(config, "heldout")
    sizes = {field: len(names) for field, names in heldout.label_names.items()}
    assert sizes == {"style": 8, "genre": 10, "artist": 205}
    assert len(train) + len(heldout) == 10339
    assert len(heldout) == 2113
    labels = torch.cat([train.labels, heldout.labels])
    assert (labels == -1).sum(dim=0).tolist() == [0, 1928, 0]
    impressionism = resolve_label(train.label_names["style"], "impressionism", "style")
    assert (labels[:, 0] == impressionism).sum() == 3400
