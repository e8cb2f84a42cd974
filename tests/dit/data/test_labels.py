"""Which columns are labels, and finding a label by name or id."""

import datasets
import pytest

from complexity_dit.data.dataset import read_labels
from complexity_dit.labels import resolve_label
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
