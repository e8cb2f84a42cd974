"""Label vocabularies, the look-up of a label by name or id, and which labels occur together.

A label field (style, genre, artist, …) is a list of names; the position of a name is its id, and
-1 stands for a missing label everywhere.
"""

import difflib
from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inl_core.run.errors import UserError
from inl_core.run.json_files import fits

MISSING = -1
"""Id of a missing label."""

_MAX_LISTED = 12
_MAX_DIGITS = 18  # of an id; Python refuses to parse numbers of thousands of digits


MAX_COMBINATIONS = 2**15
"""Most combinations of labels that are kept with a pipeline, about half a megabyte."""


class LabelTable:
    """The combinations of labels in a training set, and how many pictures have each.

    Args:
        counts: Pictures by combination: one id per field, separated by spaces, -1 where missing;
            the form in which a pipeline saves it.
        sizes: Number of names of each field.

    Raises:
        UserError: A combination has another number of fields, an id that no name has, or a count
            below 1.
    """

    def __init__(self, counts: Mapping[str, int], sizes: Sequence[int]) -> None:
        try:
            rows = np.array([[int(i) for i in key.split()] for key in counts], np.int64)
            if not fits(dict(counts), dict[str, int]) or rows.shape != (len(counts), len(sizes)):
                raise ValueError(f"not counts of combinations of {len(sizes)} ids")
            if ((rows < MISSING) | (rows >= np.asarray(sizes))).any() or min(counts.values()) < 1:
                raise ValueError("an id without a name, or a count below 1")
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"label_counts does not fit the labels: {error}") from error
        order = np.lexsort(rows.T[::-1])  # JSON may have sorted them as text
        self._rows, self._counts = rows[order], np.array([*counts.values()], np.int64)[order]

    @staticmethod
    def counted(labels: ArrayLike, seed: int = 0) -> dict[str, int] | None:
        """Count the combinations in the ids (N, F) of a data set; None without fields.

        Of more than `MAX_COMBINATIONS` of them, those of so many random pictures are counted.
        """
        labels = np.asarray(labels)
        if labels.shape[1] == 0:
            return None
        rows, counts = np.unique(labels, axis=0, return_counts=True)
        if len(rows) > MAX_COMBINATIONS:
            chosen = np.random.default_rng(seed).permutation(len(labels))[:MAX_COMBINATIONS]
            rows, counts = np.unique(labels[chosen], axis=0, return_counts=True)
        return {
            " ".join(map(str, row)): count
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
        }

    def most_frequent(self) -> list[int]:
        """The combination that most pictures have, as F ids."""
        return self._rows[self._counts.argmax()].tolist()

    def fill(self, ids: ArrayLike, shares: ArrayLike) -> NDArray[np.int64]:
        """Draw the labels that are not given from the pictures that have the given ones.

        They are those of one picture, so they occur together; one of them may be missing, as it is
        in that picture. Where no picture has the given labels, the others stay missing.

        Args:
            ids: Given labels, (N, F), -1 where not given.
            shares: (N,) in [0, 1), one uniform random number per row.

        Returns:
            Labels, (N, F).
        """
        ids, shares = np.asarray(ids, np.int64), np.asarray(shares, np.float64)
        filled = ids.copy()
        requests, of_request = np.unique(ids, axis=0, return_inverse=True)
        of_request = of_request.reshape(-1)  # NumPy 2.0 gave it a second dimension
        for number, request in enumerate(requests):
            matches = ((request == MISSING) | (self._rows == request)).all(1)
            if matches.any():
                mine = of_request == number
                ends = self._counts[matches].cumsum()
                picks = np.searchsorted(ends, shares[mine] * ends[-1], side="right")
                # A share next to 1 may be rounded up.
                filled[mine] = self._rows[matches][picks.clip(max=len(ends) - 1)]
        return filled


def resolve_label(names: Sequence[str], value: str | int | None, field: str) -> int:
    """Find the id of a label given by name or by id.

    An exact match comes first; then case is ignored, and spaces, underscores and hyphens are alike.
    Text that matches no name and is a whole number is read as an id.

    Args:
        names: The names of the field, in id order.
        value: A name, an id in [0, len(names)), or None for "no label".
        field: The name of the field, for error messages.

    Returns:
        The id, or -1 for None.

    Raises:
        UserError: There is no such name or id (similar names are listed), or several names match.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, str | Integral):  # NumPy's integers too
        raise UserError(f"{field} {value!r} must be a name, an id or None")
    if isinstance(value, str):
        if value in names:
            return list(names).index(value)
        folded = [_fold(name) for name in names]
        matches = [i for i, name in enumerate(folded) if name == _fold(value)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            listed = ", ".join(repr(names[i]) for i in matches)
            raise UserError(f"{field} {value!r} matches several names: {listed}; write one of them")
        if not value.strip().isdecimal() or len(value) > _MAX_DIGITS:
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
    return int(value)


def _suggest(names: Sequence[str], folded: Sequence[str], value: str) -> str:
    similar = difflib.get_close_matches(_fold(value), folded, n=5, cutoff=0.5)
    if similar:
        ids = dict.fromkeys(i for text in similar for i, name in enumerate(folded) if name == text)
        return "near: " + ", ".join(repr(names[i]) for i in ids)
    listed = ", ".join(repr(name) for name in names[:_MAX_LISTED])
    return "the names are " + listed + (", …" if len(names) > _MAX_LISTED else "")


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
