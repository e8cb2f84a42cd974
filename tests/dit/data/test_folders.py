"""Folders as people have them: what is a picture, what is a label, and what is left out."""

import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from complexity_dit.config import DataConfig
from complexity_dit.data import sources
from complexity_dit.data.dataset import PaintingDataset, load_data
from complexity_dit.evaluation.image_sets import folder_images
from inl_core.run.errors import UserError
from support.pictures import encoded, random_image


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def put(root: Path, *names: str) -> None:
    """Another picture for every name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(sum(map(ord, name))).save(path)


def load(root: Path, **settings: object) -> PaintingDataset:
    return load_data(DataConfig(source=f"imagefolder:{root}", resolution=8, **settings), "all")


def labels(root: Path, field: str = "label", **settings: object) -> dict[str, str | None]:
    """The name of the label of every picture, by its place below the root."""
    data = load(root, **settings)
    names = data.label_names.get(field)
    if names is None:
        return {}
    column = data.labels[:, list(data.label_names).index(field)].tolist()
    return {
        os.path.relpath(data.name(i).rsplit(" (row ", 1)[0], root): names[n] if n >= 0 else None
        for i, n in enumerate(column)
    }


# Labels from folders


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/1.png", "b/2.png", "stray.png"], ["a", "b", None]),
        (["a/1.png", "b/c/2.png", "b/3.png"], ["a", "b", "b"]),
        (["a/x/1.png", "a/y/2.png", "b/z/3.png"], ["a", "a", "b"]),
        (["all/a/1.png", "all/b/2.png"], ["a", "b"]),
        (["train/a/1.png", "train/b/2.png", "test/a/3.png"], ["a", "b", "a"]),
        (["Train/a/1.png", "val/b/2.png", "val/stray.png"], ["a", "b", None]),
        (["art/train/a/1.png", "art/test/all/b/2.png"], ["a", "all"]),
        (["train/1.png", "ship/2.png"], ["train", "ship"]),
        (["001/1.png", "010/2.png", "None/3.png"], ["001", "010", "None"]),
    ],
)
def test_a_folder_below_the_root_is_a_label(root: Path, names: list[str], expected) -> None:
    put(root, *names)
    assert labels(root) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["a/1.png"], ["train/1.png", "test/2.png"]])
def test_folders_that_tell_nothing_apart_are_no_labels(root: Path, names: list[str]) -> None:
    put(root, *names)
    assert load(root).label_names == {}


@pytest.mark.parametrize(
    "names",
    [
        ["b/2.png", "a/1.png", "a/10.png", "c d/3.png"],
        ["x/b/2.png", "x/a/1.png", "x/a.b/10.png"],
        ["2.png", "10.png", "B.png", "a.png"],
    ],
)
def test_ordinary_folders_are_read_as_datasets_reads_them(root: Path, names: list[str]) -> None:
    """So that a training goes on with the same pictures, labels and order as before."""
    put(root, *names)
    theirs = datasets.load_dataset("imagefolder", data_files=[f"{root}/**"], split="train")
    ours = load(root)
    pictures = theirs.cast_column("image", datasets.Image(decode=False))["image"]
    names = [ours.name(i).rsplit(" (row ", 1)[0] for i in range(len(ours))]
    assert names == [picture["path"] for picture in pictures]
    if "label" in theirs.features:
        assert ours.label_names["label"] == theirs.features["label"].names
        assert ours.labels[:, 0].tolist() == list(theirs["label"])


def test_links_are_followed_and_end(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "far", "1.png")
    put(root, "a/2.png")
    (root / "b").symlink_to(tmp_path / "far")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "further up").symlink_to(tmp_path)
    (root / "c").symlink_to(root / "b")
    assert labels(root) == {"a/2.png": "a", "b/1.png": "b"}


def test_names_that_are_not_utf8_are_read(root: Path) -> None:
    put(root, "a/1.png", "b/2.png")
    os.rename(root / "a" / "1.png", os.fsencode(root / "a") + b"/caf\xe9.png")
    os.rename(root / "b", os.fsencode(root) + b"/\xff")
    data = load(root)
    assert data.label_names == {"label": ["\\xff", "a"]}
    assert "caf\\xe9.png (row 0)" in data.name(0)
    assert folder_images(root).read([0, 1]).shape == (2, 16, 20, 3)


# Tables


def test_text_in_a_table_stays_text(root: Path) -> None:
    put(root, "1.png", "2.png", "3.png", "4.png")
    rows = ["file_name,style,number,year", "1.png,None,001,1900", "2.png,NA,010,NA"]
    (root / "metadata.csv").write_text("\n".join([*rows, "3.png,nan,001,1901", "4.png,,,"]))
    fields = ["style", "number", "year"]
    data = load(root, label_fields=fields)
    assert data.label_names == {
        "style": ["NA", "None", "nan"], "number": ["001", "010"], "year": ["1900", "1901"],
    }  # fmt: skip
    assert data.labels.tolist() == [[1, 0, 0], [0, 1, -1], [2, 0, 1], [-1, -1, -1]]


def test_only_columns_of_names_are_labels_by_themselves(root: Path) -> None:
    put(root, *(f"{i}.png" for i in range(4)))
    lines = ["file_name,style,year,score,signed"]
    lines += [f"{i}.png,{'ab'[i % 2]},{1900 + i % 2},{i % 2}.5,{i % 2 == 0}" for i in range(4)]
    (root / "metadata.csv").write_text("\n".join(lines))
    assert list(load(root).label_names) == ["style"]
    data = load(root, label_fields=["signed"])
    assert data.label_names == {"signed": ["False", "True"]}


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix.lower() == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(lines))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    "name",
    ["metadata.csv", "Metadata.CSV", "labels.csv", "metadata.jsonl", "labels.jsonl",
     "metadata.parquet"],
)  # fmt: skip
@pytest.mark.parametrize("column", ["file_name", "Filename"])
def test_every_kind_of_table_is_read(root: Path, name: str, column: str, caplog) -> None:
    put(root, "x/1.png", "y/2.png", "y/3.png", "y/4.png", "z.png", "z2.png")
    rows = [{column: f"{d}/{i}.png", "style": s} for d, i, s in ("x1a", "y2b", "y3a", "y4b")]
    write_table(root / name, rows)
    with caplog.at_level("INFO"):
        found = labels(root, "style")
    assert found == {"x/1.png": "a", "y/2.png": "b", "y/3.png": "a", "y/4.png": "b"}
    assert f"all: 4 images (left out: 2 not listed in {name}), style (2)" in caplog.text


def test_a_table_about_other_things_is_not_one_of_labels(root: Path, caplog) -> None:
    put(root, "a/1.png", "b/2.png")
    (root / "labels.csv").write_text("id,name\n1,a\n2,b\n")
    with caplog.at_level("INFO"):
        assert labels(root) == {"a/1.png": "a", "b/2.png": "b"}
    assert "2 images (left out: 1 other file(s) (.csv)), label (2)" in caplog.text


def test_a_table_in_every_folder_and_in_an_archive(root: Path) -> None:
    put(root, "x/1.png", "y/2.png")
    for folder, style in (("x", "a"), ("y", "b")):
        number = 1 + (folder == "y")
        (root / folder / "metadata.csv").write_text(f"file_name,style\n{number}.png,{style}\n")
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        archive.writestr("in/3.png", encoded(random_image(3)))
        archive.writestr("in/4.png", encoded(random_image(4)))
        archive.writestr("in/metadata.csv", "file_name,style\n3.png,a\n4.png,b\n")
        archive.writestr("__MACOSX/in/._3.png", b"")
    data = load(root)
    assert data.label_names == {"style": ["a", "b"]}
    assert data.labels[:, 0].tolist() == [0, 1, 0, 1]


def test_several_columns_of_files(root: Path) -> None:
    put(root, "1.png", "2.png", "m1.png", "m2.png")
    rows = ["image_file_name,mask_file_name", "1.png,m1.png", "2.png,m2.png"]
    (root / "metadata.csv").write_text("\n".join(rows))
    for column, first in ((None, "/1.png"), ("mask", "/m1.png")):
        assert first in load(root, image_column=column).name(0)
    with pytest.raises(UserError, match=r"are \['image', 'mask'\]; image_column 'depth' is not"):
        load(root, image_column="depth")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "a,b\n1.png,x\n", "has the columns a, b; one must be file_name"),
        ("metadata.csv", "", "has the columns (none); one must be file_name"),
        ("metadata.csv", "file_name,a,a\n", "it has two columns 'a'"),
        ("metadata.csv", "file_name\n1.png,x\n", "line 2 has 2 cells, the first 1"),
        ("metadata.csv", "file_name\n\xff", "cannot read"),
        ("metadata.csv", "file_name,a\n", "metadata.csv lists no pictures"),
        ("metadata.jsonl", '{"file_name": "1.png"}\n[]', "line 2 is not an object"),
        ("metadata.jsonl", "{", "line 1: "),
        ("metadata.parquet", "PAR1", "metadata.parquet: "),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(root: Path, name, text: str, words: str) -> None:
    put(root, "1.png")
    (root / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load(root)
    assert words in str(caught.value)


def test_what_is_left_out_is_counted(root: Path, caplog) -> None:
    put(root, "a/1.png", "b/2.png", ".hidden/3.png", "a/._1.png")
    (root / "a" / "1.heic").write_bytes(b"x")
    (root / "a" / "notes.txt").write_text("x")
    (root / "b" / "4.png").write_bytes(b"broken")
    (root / "b" / "5.png").symlink_to("nowhere")
    os.mkfifo(root / "b" / "6.png")
    with caplog.at_level("INFO"):
        data = load(root)
    assert (len(data), data.skipped) == (2, 3)
    line = "left out: 3 that cannot be used, 1 hidden folder(s), 1 hidden picture(s), 2 other"
    assert line in caplog.text
    for name in ("5.png", "6.png"):
        with pytest.raises(UserError, match=rf"{name} is not (there|a file)"):
            folder_images(root)
        (root / "b" / name).unlink()
    assert len(folder_images(root)) == 3


# Caches


def test_a_picture_replaced_within_its_time_is_read_again(root: Path) -> None:
    put(root, "1.bmp", "2.bmp")
    before = load(root)
    times = [(path, path.stat().st_mtime_ns) for path in root.iterdir()]
    random_image(99).save(root / "1.bmp")  # of the same size
    for path, time in times:
        os.utime(path, ns=(time, time))
    after = load(root)
    assert after.fingerprint != before.fingerprint
    assert not np.array_equal(after.pixels([0]), before.pixels([0]))


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize("damage", ["remove", "cut off", "fill"])
def test_a_purged_cache_is_made_again(root: Path, empty_cache: Path, source, damage) -> None:
    put(root, "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    config = DataConfig(f"imagefolder:{root}", resolution=8)
    if source == "hub":
        rows = [{"image": {"bytes": path.read_bytes()}} for path in sorted(root.rglob("*.png"))]
        features = datasets.Features({"image": datasets.Image()})
        (root.parent / "hub").mkdir()
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(root.parent / "hub" / "train.parquet")
        config = DataConfig(f"hub:{root.parent / 'hub'}", resolution=8)
    before = load_data(config, "all")
    found = list(empty_cache.rglob("*.arrow"))
    assert found
    for path in found:
        content = path.read_bytes()
        path.unlink()
        if damage != "remove":
            path.write_bytes(content[:100] if damage == "cut off" else bytes(len(content)))
    assert load_data(config, "all").fingerprint == before.fingerprint


def test_the_old_preparation_is_used_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, "a/1.png", "b/2.png")
    load(root)
    monkeypatch.setattr(sources, "square_pixels", None)
    load(root)
