"""The files of a data set that anyone may have made: only those in its own folder are read.

The card of a data set (`README.md`) can name any path or address as its data, and a folder can hold
links to any file.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from inl_core.run.errors import UserError
from inl_core.run.files import read_text
from inl_core.run.settings import MAX_SETTINGS_BYTES, parse_yaml

_CARDS = ("README.md", ".huggingface.yaml")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*[\r\n]+(.*?)[\r\n]+---[ \t]*([\r\n]|$)", re.DOTALL)


def check_card(folder: Path) -> None:
    """Refuse a card that names data outside its folder; no path in it is looked up.

    Raises:
        UserError: The card names such a path or an address, or cannot be read.
    """
    for path in (folder / name for name in _CARDS):
        if not path.exists():
            continue
        text = read_text(path, MAX_SETTINGS_BYTES, follow_links=True)
        if path.suffix == ".md":
            block = _FRONT_MATTER.match(text)
            text = block[1] if block else ""
        try:
            card = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}; correct or remove it") from None
        for name in _named_files(card.get("configs") if isinstance(card, dict) else None):
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if name.startswith(("/", "~")) or ".." in parts or ":" in name:
                raise UserError(
                    f"{path} names {name!r} as data, which lies outside {folder} and is not read: "
                    "copy the file into the folder and correct the name"
                )


def check_inside(files: Iterable[str], folder: Path) -> None:
    """Refuse files of a data set that lie outside its folder, also by way of links.

    The files of a folder in the cache of the Hub are links into the blobs beside it.

    Raises:
        UserError: Names the first such file.
    """
    root = os.path.realpath(folder)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    for name in files:
        real = os.path.realpath(name)
        if "://" in name or not any(real.startswith(os.path.join(one, "")) for one in roots):
            raise UserError(
                f"{name} lies outside {folder}"
                f"{f' (it is {real})' if real != os.path.abspath(name) else ''} and is not read: "
                "copy the file into the folder"
            )


def check_data_files(
    files: Mapping[str, Iterable[Any]] | None, name: str, folder: Path | None
) -> None:
    """Refuse data files, by split, that a data set names but that are not its own.

    Args:
        files: What `datasets` found (`builder.config.data_files`).
        name: Name of the data set on the Hub.
        folder: The folder that it is read from instead, if any.

    Raises:
        UserError: Names the first such file.
    """
    names = [str(one) for split in (files or {}).values() for one in split]
    if folder is not None:
        check_inside(names, folder)
        return
    own = name.removeprefix("hf://").removeprefix("datasets/")
    for one in names:
        if not one.startswith((f"hf://datasets/{own}@", f"hf://{own}/")):
            raise UserError(f"{name} names {one!r} as data, which is not its own and is not read")


def _named_files(value: Any, inside: bool = False) -> Iterator[str]:
    """Every text below `data_files`, `data_dir` and the like in the configs of a card."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named_files(inner, inside or key in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for inner in value:
            yield from _named_files(inner, inside)
    elif inside and isinstance(value, str):
        yield value
