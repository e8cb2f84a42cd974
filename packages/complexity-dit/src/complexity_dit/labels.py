"""Label vocabularies: which columns of a dataset are labels, their names, ids, and look-up by name.

A label field (style, genre, artist, …) is a list of names; the position of a name is its id, and
-1 stands for a missing label everywhere.
"""

import difflib
from collections.abc import Sequence

from inl_core.run.errors import UserError

MISSING = -1
"""Id of a missing label."""

_SHOWN = 12
_LONGEST_ID = 18  # digits; Python refuses to read thousands of them


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
