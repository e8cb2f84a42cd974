"""Image folders, and .npz files of images and of statistics."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from complexity_dit.evaluation.distances import Statistics
from complexity_dit.evaluation.image_sets import (
    KeptStatistics,
    array_images,
    folder_images,
    labels_for_samples,
    npz_images,
    read_statistics,
    write_statistics,
)
from inl_core.run.errors import UserError
from support.pictures import noise, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", noise(3, 12))


def save(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.tif", save(Image.new("F", (12, 12)), format="TIFF"), r"x\.tif has floating-point"),
        ("x.png", save(Image.new("RGB", (9, 8))), r"x\.png is 9x8 and 0000\.png is 12x12"),
        ("x.png", save(Image.fromarray(noise(1, 12)[0]))[:-60], r"x\.png cannot be decoded"),
        ("x.png", b"", r"x\.png is not an image"),
    ],
)  # fmt: skip
def test_errors_name_unsuitable_files(folder: Path, name: str, data: bytes, words: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        folder_images(folder).read(range(4))


def test_grey_images_are_read_with_equal_channels(folder: Path) -> None:
    Image.new("L", (12, 12), 77).save(folder / "x.png")
    assert (folder_images(folder).read([3]) == 77).all()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_images_equal_the_array(tmp_path: Path, write) -> None:
    images, path = noise(5, 12), tmp_path / "a.npz"
    write(path, arr_0=images, other=np.zeros(2))
    found = npz_images(path)
    assert found is not None
    assert (len(found), found.size) == (5, (12, 12))
    np.testing.assert_array_equal(found.read([4, 0]), images[[4, 0]])
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    assert npz_images(path) is None


def test_an_uncompressed_array_is_memory_mapped(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=noise(5, 12))
    found = npz_images(tmp_path / "a.npz")
    assert found is not None
    mapped = found.read.__closure__
    assert mapped is not None
    assert any(isinstance(cell.cell_contents, np.memmap) for cell in mapped)


def test_unsuitable_npz_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    broken = noise(3, 12).astype(np.float32)
    broken[1, 0, 0, 0] = np.nan
    cases = [
        (broken, "float32 .*, 1 image with non-finite values; expected images as uint8"),
        (noise(3, 12).transpose(0, 3, 1, 2), r"uint8 of shape \(3, 3, 12, 12\); expected"),
        (noise(1, 12), "holds 1 images"),
    ]
    for array, words in cases:
        np.savez(path, arr_0=array)
        with pytest.raises(UserError, match=words):
            npz_images(path)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="cannot be read as"):
        npz_images(path)
    with pytest.raises(UserError, match="there is no file"):
        npz_images(tmp_path / "none.npz")
    with pytest.raises(UserError, match="expected images as uint8"):
        array_images(broken)


def test_statistics_survive_writing_and_reading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    statistics = Statistics(rng.random(4), np.eye(4), 40)
    identity = {"name": "n", "weights_sha256": "s", "resize": "tf1", "dtype": "float32"}
    path = tmp_path / "s.npz"
    write_statistics(path, KeptStatistics(statistics, identity, "print"))
    kept = read_statistics(path)
    assert (kept.identity, kept.fingerprint) == (identity, "print")
    for a, b in zip(kept.statistics, statistics, strict=True):
        np.testing.assert_array_equal(a, b)


def test_statistics_of_other_programs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    adm = {"mu_s": np.ones(2), "sigma_s": np.eye(2)}
    np.savez(path, mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), **adm)
    kept = read_statistics(path)
    assert (kept.identity, kept.statistics.n) == ({}, 0)
    assert kept.statistics.sigma.dtype == np.float64
    for arrays, words in (
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.array([np.nan]), "sigma": np.eye(1)}, "not finite"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "name": "x"}, "without dtype, resize"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=words):
            read_statistics(path)


def test_fields_that_the_reference_lacks_are_drawn_for_its_labels(counted_pipe) -> None:
    real = replace(
        array_images(noise(6, 8)), labels=np.array([[0], [1], [2], [-1], [1], [0]]),
        label_names={"style": ["Fauvism", "Cubism", "Vorticism"]},
    )  # fmt: skip
    rows = np.arange(6)
    labels, asked = labels_for_samples(counted_pipe, 6, real, rows, seed=1)
    # A style that the pipeline does not know, or that is missing in the reference, stays missing.
    assert labels[:, 0].tolist() == [1, 0, -1, -1, 0, 1]
    assert asked["style"].tolist() == [0, 1, -1, -1, 1, 0]
    assert labels[[0, 5], 1].tolist() == [1, 1]
    assert set(labels[[1, 4], 1].tolist()) <= {0, 1}
    # Without labels in the reference all are drawn, together.
    labels, asked = labels_for_samples(counted_pipe, 64, None, rows, seed=1)
    assert {tuple(row) for row in labels.tolist()} == {(0, 0), (0, 1), (1, 1), (2, -1)}
    assert not asked
