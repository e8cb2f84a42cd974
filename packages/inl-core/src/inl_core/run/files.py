"""Files and folders that are whole or absent, also after a kill -9 or a power loss.

Everything is written under a scratch name in the same folder, flushed to disk and renamed. Scratch
names begin with a dot; `remove_partial_writes` clears them after a kill:

    .NAME.partial[...]   being written: worth nothing
    .NAME.old            whole, moved out of the way of a new NAME that is whole too
    .NAME.removed        being removed: worth nothing
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target` that becomes `target` when the block ends well.

    Readers see the old file or the whole new one; an error leaves the old one as it was. The
    scratch file has a name of its own, so two processes may write the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.partial.", suffix=target.suffix
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
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends well.

    On an error the scratch folder is removed and `target` is as it was. A folder cannot be replaced
    in one step as a file can: a kill between the two renames leaves the old one whole as
    `.NAME.old`, and `remove_partial_writes`, or the next call for the same target, gives it its
    name back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (
        target.with_name(f".{target.name}.partial"),
        target.with_name(f".{target.name}.old"),
    )
    _put_back(old, target)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            _flush(path)
        _flush(aside)
        if target.exists():
            target.replace(old)
        try:
            aside.replace(target)
        except BaseException:
            _put_back(old, target)
            raise
        _flush(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill on the way leaves nothing half-removed under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.replace(removed)
    shutil.rmtree(removed)


def remove_partial_writes(folder: Path) -> None:
    """Clear what killed writers left in a folder that nobody else is writing in."""
    for old in folder.glob(".*.old"):
        _put_back(old, old.with_name(old.name.removeprefix(".").removesuffix(".old")))
    for pattern in (".*.partial", ".*.partial.*", ".*.old", ".*.removed"):
        for stale in folder.glob(pattern):
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()


def _put_back(old: Path, target: Path) -> None:
    if old.exists() and not target.exists():
        old.replace(target)


def _flush(path: Path) -> None:
    """fsync, so that a rename cannot overtake the contents at a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
