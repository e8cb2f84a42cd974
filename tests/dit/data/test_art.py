"""The embedded art set: fixed bytes, sizes, labels and refused arguments."""

import hashlib
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from complexity_dit.data import art
from inl_core.run.errors import UserError

PAIRS = len(art.SCHOOLS) * len(art.PALETTES)


def pixels(*args, **kwargs) -> np.ndarray:
    return np.asarray(art.paint(*args, **kwargs)).astype(np.float64)


def test_labels_are_balanced_over_schools_and_palettes():
    assert art.LABEL_NAMES == {"style": art.SCHOOLS, "genre": art.PALETTES}
    assert len(set(art.SCHOOLS)) == len(art.SCHOOLS) >= 8
    assert len(set(art.PALETTES)) == len(art.PALETTES) >= 4
    pairs = Counter((d["style"], d["genre"]) for d in map(art.labels_of, range(3 * PAIRS)))
    assert len(pairs) == PAIRS
    assert set(pairs.values()) == {3}
    first = [art.labels_of(i)["style"] for i in range(len(art.SCHOOLS))]
    assert sorted(first) == list(range(len(art.SCHOOLS)))


def test_paintings_have_the_published_bytes():
    # Published FIDs and cached statistics refer to these pictures: another digest is another set.
    digest = hashlib.sha256()
    for index in range(PAIRS):
        digest.update(art.paint(index, 32).tobytes())
    assert digest.hexdigest() == "b724f57e58b1e59c301a070685792917053a2b3278854b48d25e7cd114915867"


def test_a_painting_is_independent_of_order_and_global_state():
    first = art.paint(5, 48).tobytes()
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    art.paint(6, 48)
    assert art.paint(5, 48).tobytes() == first
    assert np.array_equal(before, np.random.get_state()[1])


def test_two_thousand_paintings_are_distinct():
    assert len({art.paint(i, 32).tobytes() for i in range(2000)}) == 2000


@pytest.mark.parametrize("school", art.SCHOOLS)
def test_within_a_school_paintings_vary(school):
    stack = np.stack([pixels(i, 32, style=school, genre=0) for i in range(24)])
    assert stack.std(axis=0).mean() > 8.0


@pytest.mark.parametrize("school", art.SCHOOLS)
@pytest.mark.parametrize("index", [0, 7])
def test_two_sizes_show_the_same_painting(school, index):
    small = pixels(index, 32, style=school)
    shrunk = np.asarray(art.paint(index, 256, style=school).reduce(8)).astype(np.float64)
    same = np.abs(small - shrunk).mean()
    other = np.abs(pixels(index + 1, 32, style=school) - shrunk).mean()
    assert same < 2.0
    assert same < 0.2 * other


def test_labels_can_be_given_as_ids_or_names():
    labels = art.labels_of(11)
    plain = art.paint(11, 32).tobytes()
    assert art.paint(11, 32, **labels).tobytes() == plain
    names = {field: art.LABEL_NAMES[field][i] for field, i in labels.items()}
    assert art.paint(11, 32, **names).tobytes() == plain
    assert art.paint(11, 32, style=(labels["style"] + 1) % 8).tobytes() != plain


def test_a_palette_changes_colours_and_keeps_the_composition():
    day = pixels(3, 64, style="Neoplasticism", genre="dawn").mean(axis=2)
    night = pixels(3, 64, style="Neoplasticism", genre="nocturne").mean(axis=2)

    def edges(grey: np.ndarray) -> np.ndarray:
        return np.abs(np.diff(grey, axis=1)).sum(axis=0) > 400

    assert edges(day).any()
    assert np.array_equal(edges(day), edges(night))


@pytest.mark.parametrize("school", art.SCHOOLS)
def test_palettes_differ_in_colour(school):
    means = [
        np.mean([pixels(i, 16, style=school, genre=g).mean(axis=(0, 1)) for i in range(8)], axis=0)
        for g in range(len(art.PALETTES))
    ]
    gaps = [np.abs(a - b).max() for k, a in enumerate(means) for b in means[:k]]
    assert min(gaps) > 10.0


def test_drawing_and_colours_use_different_random_streams():
    # SeedSequence pads keys with zeros, so a short key and one ending in 0 are the same stream.
    drawing, colours = art.Dice(1, 3, 0, 9), art.Dice(2, 3, 0, 9)
    assert drawing.array(4).tolist() != colours.array(4).tolist()


@pytest.mark.parametrize("size", [1, 7, (40, 24), (24, 40), np.int64(16)])
def test_sizes(size):
    image = art.paint(2, size)
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.size == (size if isinstance(size, tuple) else (int(size), int(size)))


def test_a_rectangular_picture_is_the_centre_of_the_square_one():
    square = np.asarray(art.paint(4, 64))
    assert np.array_equal(np.asarray(art.paint(4, (64, 32))), square[16:48])
    assert np.array_equal(np.asarray(art.paint(4, (32, 64))), square[:, 16:48])


@pytest.mark.parametrize("school", art.SCHOOLS)
def test_drawing_in_bands_gives_the_same_bytes(school, monkeypatch):
    expected = art.paint(1, 48, style=school).tobytes()
    monkeypatch.setattr(art, "_BAND_SAMPLES", 96 * 2 * 7)
    assert art.paint(1, 48, style=school).tobytes() == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"index": -1}, "index is -1; expected an integer of 0 or more"),
        ({"index": 1.5}, "index is 1.5"),
        ({"index": 0, "size": 0}, "size is 0; expected a whole number of pixels from 1"),
        ({"index": 0, "size": 32.0}, "size is 32.0"),
        ({"index": 0, "size": (32, 32, 3)}, r"size is \(32, 32, 3\)"),
        ({"index": 0, "size": art.MAX_SIZE + 1}, f"to {art.MAX_SIZE}"),
        (
            {"index": 0, "style": "Orfism"},
            "'Orfism' is not one of its 9 names; near: 'Orphism'",
        ),
        ({"index": 0, "genre": "zzz"}, "genre 'zzz' is not .*; the names are 'dawn', 'ocean'"),
        ({"index": 0, "style": 99}, "style 99 is not an id: style has 9 names"),
        ({"index": 0, "genre": -1}, "genre -1 is not an id"),
        ({"index": 0, "genre": 0.5}, "genre 0.5 must be a name, an id"),
    ],
)
def test_bad_arguments_are_refused_with_the_value_and_what_is_expected(kwargs, message):
    with pytest.raises(UserError, match=message):
        art.paint(**kwargs)
    if set(kwargs) == {"index"}:
        with pytest.raises(UserError, match=message):
            art.labels_of(**kwargs)


def test_painting_is_fast_enough_to_train_from():
    # 2,000 per second on an idle core; a tenth of that leaves room for a busy machine.
    started = time.process_time()
    for index in range(200):
        art.paint(index, 32)
    assert 200 / (time.process_time() - started) > 200
