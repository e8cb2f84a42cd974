"""Files and folders that are whole or absent: written aside, flushed to disk, renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target` that becomes `target` when the block ends well.

    Readers see the old file or the whole new one; an error leaves the old one as it was. The
    scratch file has a name of its own, so two processes may write the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix
    )
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        _flush(aside)
        aside.chmod(0o644)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends well.

    On an error the scratch folder is removed and `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        move_into_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_into_place(aside: Path, target: Path) -> None:
    """Give a finished scratch folder its final name; what had that name is replaced."""
    for path in aside.rglob("*"):
        _flush(path)
    _flush(aside)
    if target.exists():
        shutil.rmtree(target)
    aside.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """fsync, so that a rename cannot overtake the contents at a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
