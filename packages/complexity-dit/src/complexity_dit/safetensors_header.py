"""Metadata of safetensors files that are written already: the header alone is replaced."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from inl_core.run.files import file_aside


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add text to a file's `__metadata__`; the tensors are copied as bytes.

    A file begins with the length of its header, 8 bytes little-endian, and the header, JSON; the
    offsets in it count from its end. Keys are sorted: equal contents give equal bytes.

    Args:
        path: The file.
        metadata: What to add, or to replace.
    """
    with path.open("rb") as old, file_aside(path) as aside, aside.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        known = header.pop("__metadata__", {}) | metadata
        text = json.dumps({"__metadata__": dict(sorted(known.items()))} | header).encode()
        text += b" " * (-len(text) % 8)  # tensors stay aligned
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)
