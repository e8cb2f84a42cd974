"""Label vocabularies and the look-up of a label by name or id.

A label field (style, genre, artist, …) is a list of names; the position of a name is its id, and
-1 stands for a missing label everywhere.
"""

import difflib
from collections.abc import Sequence
from numbers import Integral

from inl_core.run.errors import UserError

MISSING = -1
"""Id of a missing label."""

_MAX_LISTED = 12
_MAX_DIGITS = 18  # of an id; Python refuses to parse numbers of thousands of digits


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
