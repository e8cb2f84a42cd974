"""Fuzzing of the parsers of images and arrays: any input gives a value or a `UserError`.

Each row is a parser. It runs for `COMPLEXITY_FUZZ_SECONDS` (10 by default, 300 for a full run).
"""

import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from complexity_dit import pictures
from complexity_dit.data.dataset import read_labels
from complexity_dit.data.folders import read_folder
from complexity_dit.evaluation import image_sets
from support.fuzzing import MARKS, Parser, Rows, of_file
from support.mangled import mangled_bytes, npz_bytes, picture_bytes, png_bytes

ROWS = Rows()
pytestmark = MARKS


def strange_npz(names: list[str]) -> st.SearchStrategy[bytes]:
    arrays = st.one_of(
        st.sampled_from([np.eye(3), np.zeros(3), np.zeros((2, 4, 4, 3), np.uint8), np.array("x")]),
        st.sampled_from([np.zeros((0,)), np.array(5), np.array([5, 6]), np.full((3, 3), np.nan)]),
        st.sampled_from(
            [np.zeros(3, "M8[s]"), np.zeros(3, "V4"), np.ones(3, complex), np.ones(3, ">f2")]
        ),
        st.just(np.array([{}, None], dtype=object)),
    )
    some = st.dictionaries(st.sampled_from([*names, "x"]), arrays, max_size=5)
    return st.tuples(some, st.booleans()).map(lambda x: npz_bytes(x[1], **x[0]))


@ROWS.row
def statistics_npz(folder: Path) -> Parser:
    current = {
        "mu": np.zeros(3),
        "sigma": np.eye(3),
        "n": np.array(9),
        "fingerprint": np.array("f"),
    }
    identity = {key: np.array("x") for key in image_sets.IDENTITY_KEYS}
    good = [npz_bytes(zipped, **current, **identity) for zipped in (False, True)]
    cases = st.one_of(mangled_bytes(good), strange_npz([*current, *identity]))
    parse = of_file(folder / "s.npz", image_sets.read_statistics)
    return Parser(cases, parse)


@ROWS.row
def images_npz(folder: Path) -> Parser:
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    good = [npz_bytes(zipped, arr_0=pictures) for zipped in (False, True)]

    def parse(path: Path) -> None:
        images = image_sets.npz_images(path)
        if images is not None:
            images.read([0, len(images) - 1])

    cases = st.one_of(mangled_bytes(good), strange_npz(["arr_0"]))
    return Parser(cases, of_file(folder / "i.npz", parse))


PICTURES = [
    png_bytes(8, "L"), png_bytes(8, "RGBA"), png_bytes(8, "P"), png_bytes(8, "1"), png_bytes(),
    picture_bytes("JPEG"), picture_bytes("GIF"), picture_bytes("BMP"), picture_bytes("TIFF"),
    picture_bytes("WEBP"), picture_bytes("JPEG", 8, "CMYK"), picture_bytes("TIFF", 8, "F"),
    picture_bytes("PPM"), picture_bytes("ICO"), picture_bytes("TGA"),
]  # fmt: skip


@ROWS.row
def image_folder(folder: Path) -> Parser:
    (folder / "0.png").write_bytes(png_bytes())

    def parse(path: Path) -> None:
        image_sets.folder_images(path.parent).read([0, 1])

    return Parser(mangled_bytes(PICTURES), of_file(folder / "1.png", parse))


@ROWS.row
def training_picture(folder: Path) -> Parser:
    cases = mangled_bytes(PICTURES)
    return Parser(cases, lambda data: pictures.square_pixels(data, 4))


TABLE = b'file_name,style,n\r\n0.png,a,1\r\n0.png,"b,c",2\r\n'
LINES = b'{"file_name": "0.png", "style": "a", "n": [1]}\n{"file_name": "0.png", "n": null}\n'


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["0.png"] * 3, "style": ["a", None, "b"]}), file)
    return file.getvalue()


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/0.png", png_bytes())
        archive.writestr("metadata.csv", TABLE.replace(b"0.png", b"a/0.png"))
    return file.getvalue()


@ROWS.row
def picture_table(folder: Path) -> Parser:
    (folder / "0.png").write_bytes(png_bytes())
    good = {
        "metadata.csv": TABLE, "labels.csv": TABLE, "metadata.jsonl": LINES,
        "metadata.parquet": parquet_bytes(), "pictures.zip": zip_bytes(),
    }  # fmt: skip

    def parse(case: tuple[str, bytes]) -> None:
        path = folder / case[0]
        path.write_bytes(case[1])
        try:
            read_labels(read_folder(str(folder), None).columns, None)
        finally:
            path.unlink()

    cases = [
        mangled_bytes([data]).map(lambda x, name=name: (name, x)) for name, data in good.items()
    ]
    return Parser(st.one_of(cases), parse)


@pytest.mark.parametrize("name", ROWS)
def test_any_input_gives_a_value_or_a_plain_error(name, tmp_path):
    ROWS.check(name, tmp_path)
