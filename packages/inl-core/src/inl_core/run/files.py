"""Files and folders that are complete or absent, also after kill -9 or a power loss.

Everything is written under a temporary name in the same folder, flushed to disk and renamed.
Temporary names begin with a dot; `remove_partial_writes` clears them after a kill:

    .NAME.partial[...]   being written, incomplete
    .NAME.old            the previous NAME, complete, moved away for a new NAME
    .NAME.removed        being removed, incomplete
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `target` if the block succeeds.

    Readers see either the old or the complete new file. The temporary name is unique, so two
    processes may write the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.partial.", suffix=target.suffix
    )
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _flush(partial)
        partial.chmod(0o644)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` if the block succeeds.

    On an error the temporary folder is removed and `target` is unchanged. A folder, unlike a file,
    cannot be replaced in one step: a kill between the two renames leaves the old one as
    `.NAME.old`, and `remove_partial_writes`, or the next call for the same target, restores it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    _restore(old, target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            _flush(path)
        _flush(partial)
        if target.exists():
            target.replace(old)
        try:
            partial.replace(target)
        except BaseException:
            _restore(old, target)
            raise
        _flush(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill leaves no incomplete folder under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.replace(removed)
    shutil.rmtree(removed)


def remove_partial_writes(folder: Path) -> None:
    """Remove what killed processes left in a folder; no process may be writing in it."""
    for old in folder.glob(".*.old"):
        _restore(old, old.with_name(old.name.removeprefix(".").removesuffix(".old")))
    for pattern in (".*.partial", ".*.partial.*", ".*.old", ".*.removed"):
        for stale in folder.glob(pattern):
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()


def _restore(old: Path, target: Path) -> None:
    if old.exists() and not target.exists():
        old.replace(target)


def _flush(path: Path) -> None:
    """Fsync a file or folder, so that a power loss cannot keep the rename and lose the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
