"""Which columns are labels, finding a label by name or id, and labels that occur together."""

import json
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np
import pytest

from complexity_dit.data.dataset import read_labels
from complexity_dit.labels import LabelTable, resolve_label
from inl_core.run.errors import UserError


def test_which_columns_are_labels() -> None:
    rows = datasets.Dataset.from_dict(
        {
            "text": ["b", " a ", "", None, "b", "a"],
            "unique": list("abcdef"),
            "one": ["x"] * 6,
            "number": [1, 1, 2, 2, 3, 3],
            "share": [0.5, 0.5, 1.5, 1.5, 2.5, 2.5],
            "kind": [0, 0, 0, -1, None, 0],
        }
    ).cast_column("kind", datasets.ClassLabel(names=["only"]))
    names, ids = read_labels(rows, None)
    assert names == {"text": ["a", "b"], "kind": ["only"]}
    assert ids.T.tolist() == [[1, 0, -1, -1, 1, 0], [0, 0, 0, -1, -1, 0]]
    with pytest.raises(UserError, match=r"'share'.*no names"):
        read_labels(rows, ["share"])


NAMES = ["Impressionism", "Ukiyo_e", "Naive Art", "naive_art", "1984"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Impressionism", 0),
        ("impressionism", 0),
        ("ukiyo e", 1),
        ("UKIYO-E", 1),
        ("naive_art", 3),
        ("1984", 4),
        ("2", 2),
        (2, 2),
        (None, -1),
    ],
)
def test_resolve_label(value: str | int | None, expected: int) -> None:
    assert resolve_label(NAMES, value, "style") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Impresionism", "style 'Impresionism' is not one of its 5 names; near: 'Impressionism'"),
        ("zzz", "names; the names are 'Impressionism', 'Ukiyo_e'"),
        ("NAIVE art", "several names: 'Naive Art', 'naive_art'"),
        (5, "style 5 is not an id: style has 5 names, with ids 0 to 4"),
        (-1, "ids 0 to 4"),
        (True, "must be a name, an id or None"),
        (1.0, "must be a name, an id or None"),
    ],
)
def test_unknown_labels(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_label(NAMES, value, "style")


LABELS = np.array([[0, 0], [0, 0], [0, 1], [1, -1], [1, 1], [2, 1], [2, 1], [2, 0]])


def table_of(labels: np.ndarray, sizes: Sequence[int] = (4, 2)) -> LabelTable:
    counts = LabelTable.counted(labels)
    assert counts is not None
    # As JSON gives it back, sorted as text.
    return LabelTable(json.loads(json.dumps(counts, sort_keys=True)), sizes)


def drawn(labels: np.ndarray, given: Sequence[int], count: int = 8000) -> Counter:
    """Combinations of `count` rows with the same given labels, at evenly spread shares."""
    shares = (np.arange(count) + 0.5) / count
    rows = table_of(labels).fill(np.tile(given, (count, 1)), shares)
    return Counter(map(tuple, rows.tolist()))


def test_labels_are_drawn_together_as_often_as_the_data_have_them() -> None:
    expected = Counter(map(tuple, LABELS.tolist()))
    assert drawn(LABELS, [-1, -1]) == {row: 1000 * n for row, n in expected.items()}
    assert table_of(LABELS).most_frequent() == [0, 0]


def test_labels_that_are_named_partly_are_completed_from_the_rows_that_match() -> None:
    assert drawn(LABELS, [2, -1], 3000) == {(2, 1): 2000, (2, 0): 1000}
    assert drawn(LABELS, [-1, 0], 3000) == {(0, 0): 2000, (2, 0): 1000}
    assert drawn(LABELS, [1, -1], 2) == {(1, -1): 1, (1, 1): 1}  # a label missing there stays so
    assert drawn(LABELS, [1, 0], 5) == {(1, 0): 5}  # what is given stays, seen together or not
    assert drawn(LABELS, [3, -1], 5) == {(3, -1): 5}  # no picture has it
    # Each row by itself, whatever the others ask for.
    mixed = table_of(LABELS).fill([[2, -1], [-1, -1], [3, -1]], [0.9, 0.0, 0.5])
    assert mixed.tolist() == [[2, 1], [0, 0], [3, -1]]
    assert table_of(LABELS).fill([[-1, -1]], [1.0]).tolist() == [[2, 1]]


def test_many_combinations_are_counted_on_random_pictures(monkeypatch) -> None:
    monkeypatch.setattr("complexity_dit.labels.MAX_COMBINATIONS", 400)
    labels = np.stack([np.arange(1000) % 10, np.arange(1000)], axis=1)
    counts = LabelTable.counted(labels)
    assert counts is not None
    assert len(counts) == sum(counts.values()) == 400
    assert {int(key.split()[0]) for key in counts} == set(range(10))
    assert LabelTable.counted(np.empty((3, 0))) is None


@pytest.mark.parametrize(
    "counts", [{"0": 1}, {"0 2": 1}, {"0 -2": 1}, {"0 0": 0}, {"0 0": "1"}, {"a b": 1}, {}, ["0 0"]]
)
def test_counts_that_do_not_fit_the_labels_are_refused(counts) -> None:
    with pytest.raises(UserError, match="label_counts does not fit"):
        LabelTable(counts, (4, 2))
