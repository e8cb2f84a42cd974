"""The Arrow files of a cache of latents: where they are, and that they hold what the cache says."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from inl_core.run.errors import UserError

PARTS = "parts"


def number_of_parts(plan: dict[str, Any]) -> int:
    """How many parts a cache has when it is whole."""
    return -(-plan["images"] // plan["part_size"])


def part_path(folder: Path, part: int) -> Path:
    """The file of one part."""
    return folder / PARTS / f"part-{part:05d}.arrow"


def open_parts(folder: Path, info: dict[str, Any]) -> datasets.Dataset:
    """Map the parts of a cache.

    Args:
        folder: Of the cache.
        info: What its `cache.json` says, checked as such.

    Raises:
        UserError: A part is absent or damaged, or its columns are not those that the cache says.
    """
    parts = []
    for number in range(number_of_parts(info)):
        path = part_path(folder, number)
        expected = min(info["part_size"], info["images"] - number * info["part_size"])
        found, said = 0, "it is not there"
        if path.is_file():
            try:
                parts.append(datasets.Dataset.from_file(str(path)))
                found, said = len(parts[-1]), f"it holds {len(parts[-1])}"
            except (OSError, pa.ArrowException) as error:
                said = f"it cannot be read ({error})"
        if found != expected:
            raise UserError(
                f"{path} should hold {expected} of the {info['images']} pictures that were "
                f"encoded, and {said}: remove {folder / 'cache.json'} and the file, and run the "
                "same encode command again"
            )
        if wrong := _wrong_column(parts[-1].data.table, info):
            raise UserError(
                f"{path} is not of the cache that {folder / 'cache.json'} describes: {wrong}; "
                "encode into a new folder"
            )
    return datasets.concatenate_datasets(parts)


def _wrong_column(table: pa.Table, info: dict[str, Any]) -> str | None:
    """What a column lacks that is read later; None if all are as the cache says."""
    numbers = math.prod(info["shape"]) * (2 if info["mirrored"] else 1)

    def is_latents(kind: pa.DataType) -> bool:
        return (
            pa.types.is_fixed_size_list(kind)
            and kind.list_size == numbers
            and kind.value_type == pa.float16()
        )

    latents = f"lists of {numbers} float16 numbers"
    wanted: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        "sha256": (pa.types.is_string, "text"),
        "name": (pa.types.is_string, "text"),
        "latents": (is_latents, latents),
    }
    if info["has_std"]:
        wanted["latents_std"] = (is_latents, latents)
    wanted |= {f"label_{f}": (pa.types.is_integer, "numbers") for f in info["label_names"]}
    for name, (is_right, kind) in wanted.items():
        if table.column_names.count(name) != 1:
            return f"no column {name!r}"
        column = table.column(name)
        if not is_right(column.type) or column.null_count:
            return f"column {name!r} holds no {kind}"
    for field, names in info["label_names"].items():
        ends = pc.min_max(table.column(f"label_{field}")).as_py()
        if ends["min"] < -1 or ends["max"] >= len(names):
            return f"label_{field} is outside of -1 to {len(names) - 1}"
    return None
