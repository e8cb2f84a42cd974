"""Label vocabularies: which columns of a dataset are labels, their names, ids, and look-up by name.

A label field (style, genre, artist, …) is a list of names; the position of a name is its id, and
-1 stands for a missing label everywhere.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch

from inl_core.run.errors import UserError

MISSING = -1
"""Id of a missing label."""

MIN_IMAGES_PER_NAME = 2
"""A text column counts as categorical when its names repeat at least this often on average."""

_SHOWN = 12
_LONGEST_ID = 18  # digits; Python refuses to read thousands of them


def read_labels(
    rows: datasets.Dataset, fields: Sequence[str] | None
) -> tuple[dict[str, list[str]], torch.Tensor]:
    """Turn the label columns of a dataset into names and ids.

    With ``fields=None`` the fields are, in column order, every ``ClassLabel`` column and every
    text column that is categorical: it has two different names or more, and the labelled rows are
    at least ``MIN_IMAGES_PER_NAME`` times as many as the names. So styles, genres and artists
    are labels and titles, captions and URLs are not. A column of numbers is a label only when it
    is asked for. Named fields are taken as they are, in the order given.

    ``ClassLabel`` keeps its own names and order; the names of other columns are sorted (numbers
    by value). None, NaN, -1 in a ``ClassLabel`` and text that is empty after stripping are missing.

    Args:
        rows: The whole data, both sides of the held-out split, so that ids agree between them.
        fields: Column names, an empty list for no labels, or None for the rule above.

    Returns:
        Names by field, and the ids, int64 of shape (rows, fields), with -1 where missing.

    Raises:
        UserError: A named field is absent, given twice, or cannot be a label.
    """
    if fields is None:
        chosen = [name for name in rows.column_names if _is_automatic(rows, name)]
    else:
        chosen = list(fields)
    if len(set(chosen)) != len(chosen):
        raise UserError(f"label_fields {chosen} names a field twice; name each one once")
    label_names: dict[str, list[str]] = {}
    columns: list[torch.Tensor] = []
    for field in chosen:
        if field not in rows.column_names:
            raise UserError(
                f"label field {field!r} is not in the data; its columns are "
                f"{', '.join(rows.column_names)}: choose among them with --data.label_fields, or "
                "set it to null for every column of names"
            )
        label_names[field], ids = _encode(rows, field)
        columns.append(torch.tensor(ids, dtype=torch.int64))
    empty = torch.empty((len(rows), 0), dtype=torch.int64)
    return label_names, torch.stack(columns, dim=1) if columns else empty


def resolve_label(names: Sequence[str], value: str | int | None, field: str) -> int:
    """Find the id of a label given by name or by id.

    A name matches whatever its case, with spaces, underscores and hyphens alike; an exact match
    comes first. Text that is no name but a whole number is read as an id.

    Args:
        names: The names of the field, in id order.
        value: A name, an id in [0, len(names)), or None for "no label".
        field: The name of the field, for the message.

    Returns:
        The id, or -1 for None.

    Raises:
        UserError: No such name or id (near names are listed), or a name that fits several.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{field} {value!r} must be a name, an id or None")
    if isinstance(value, str):
        if value in names:
            return list(names).index(value)
        folded = [_fold(name) for name in names]
        hits = [i for i, name in enumerate(folded) if name == _fold(value)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            same = ", ".join(repr(names[i]) for i in hits)
            raise UserError(f"{field} {value!r} fits several names: {same}; write one of them")
        if not value.strip().isdecimal() or len(value) > _LONGEST_ID:
            raise UserError(
                f"{field} {value!r} is not one of its {len(names)} names; "
                f"{_suggest(names, folded, value)}"
            )
        value = int(value)
    if not 0 <= value < len(names):
        raise UserError(
            f"{field} {value} is not an id: {field} has {len(names)} names, "
            f"with ids 0 to {len(names) - 1}"
        )
    return value


def _suggest(names: Sequence[str], folded: Sequence[str], value: str) -> str:
    near = difflib.get_close_matches(_fold(value), folded, n=5, cutoff=0.5)
    if near:
        hits = dict.fromkeys(i for text in near for i, name in enumerate(folded) if name == text)
        return "near: " + ", ".join(repr(names[i]) for i in hits)
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return "nothing is near; the names are " + shown + (", …" if len(names) > _SHOWN else "")


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _is_automatic(rows: datasets.Dataset, column: str) -> bool:
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return True
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        return False
    values = [value for value in _values(rows, column) if value is not None]
    count = len(set(values))
    return count >= 2 and len(values) >= MIN_IMAGES_PER_NAME * count


def _encode(rows: datasets.Dataset, field: str) -> tuple[list[str], list[int]]:
    feature = rows.features[field]
    values = _values(rows, field)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), [
            MISSING if value is None or value < 0 else int(value) for value in values
        ]
    kinds = {type(value) for value in values if value is not None}
    if not kinds <= {str} and not kinds <= {int} and not kinds <= {bool}:
        raise UserError(
            f"label field {field!r} holds {feature}, which has no names; a label is a ClassLabel, "
            "text or whole numbers"
        )
    ordered: list[Any] = sorted({value for value in values if value is not None})
    if not ordered:
        raise UserError(f"label field {field!r} is empty in every row; leave it out")
    ids = {value: i for i, value in enumerate(ordered)}
    return [str(value) for value in ordered], [ids.get(value, MISSING) for value in values]


def _values(rows: datasets.Dataset, column: str) -> list[Any]:
    """One column with every spelling of "missing" turned into None."""
    # The column alone, as Arrow: a row-wise read would pull the images in too.
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return [_clean(value) for value in values]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip() or None
    # A CSV column of whole numbers with gaps in it arrives as floats.
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value
