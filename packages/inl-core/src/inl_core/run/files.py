"""Files and folders that are complete or absent after kill -9, and files that are read with care.

Everything is written under a temporary name in the same folder, flushed to disk and renamed. No
other program uses these names; `remove_partial_writes` clears them after a kill:

    .NAME.RANDOM.complexity-partial     being written, incomplete
    .NAME.complexity-old                the previous NAME, complete, moved away for a new NAME
    .NAME.RANDOM.complexity-removed     being removed, incomplete
    .RANDOM.complexity-complete         complete, being moved into the folder that it is in

A file that is read may be anybody's. `open_regular` neither waits for the other end of a pipe nor
reads a device, and `read_bytes` and `read_text` stop at a bound.
"""

import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from inl_core.run.errors import UserError

_PARTIAL, _OLD, _REMOVED = ".complexity-partial", ".complexity-old", ".complexity-removed"
_COMPLETE = ".complexity-complete"

_NAMES_OF_0_1_0 = re.compile(
    r"\.(?P<target>step-\d{8}(\.png)?|(train_log|heldout_log|noise_levels|metrics|dynamics)\.csv"
    r"|config\.yaml|(result|settings|plan|cache)\.json|report\.html|(loss|samples|\d{6})\.png"
    r"|samples\.txt|part-\d{5}\.arrow"
    r"|pipeline|adapter|model|tokenizer|trainer(\.model)?)\.(?P<end>partial(\..*)?|old|removed)"
)
"""Temporary names of version 0.1.0 for what it wrote into runs, latents and evaluations."""

# ------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `target` if the block succeeds.

    Readers see either the old or the complete new file. The temporary name is unique, so two
    processes may write the same target. The file has the permissions that the umask leaves.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _aside(target, _PARTIAL)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = stat.S_IMODE(partial.stat().st_mode)
    try:
        yield partial
        partial.chmod(mode)  # the writer may have put a file of its own in the place
        _flush(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` if the block succeeds.

    On an error the temporary folder is removed and `target` is unchanged. A folder, unlike a file,
    cannot be replaced in one step: a kill between the two renames leaves the old one as
    `.NAME.complexity-old`, and `remove_partial_writes`, or the next call for the same target,
    restores it. Files and folders have the permissions that the umask leaves.

    Args:
        target: The folder.
        replace: Whether it may exist; if not, it is an error at the end too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _aside(target, _PARTIAL), target.with_name(f".{target.name}{_OLD}")
    _restore(old, target)
    try:
        partial.mkdir()
        yield partial
        _finish_folder(partial)
        if replace and os.path.lexists(target):
            target.replace(old)
        try:
            partial.replace(target)
        except BaseException:
            _restore(old, target)
            raise
        _flush(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists() and os.path.lexists(old):
            with suppress(OSError):
                _remove(old)


@contextmanager
def merged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of `target` if the block succeeds.

    For a model that is saved into a folder of the user, where all other files stay; it may be a
    mount point, a link, or the current folder. Weights of the same name in another number of shards
    are removed. After a kill at any moment the old files are there, or the new ones, or none: then
    `finish_merge`, or the next call, puts the new ones in place.
    """
    target.mkdir(parents=True, exist_ok=True)
    finish_merge(target)
    mine = f".{socket.gethostname()}-"
    for stale in target.glob(f"{mine}*{_PARTIAL}"):
        if not _is_alive(int(stale.name.removeprefix(mine).partition("-")[0])):
            _remove(stale)
    partial = target / f"{mine}{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}"
    try:
        partial.mkdir()
        yield partial
        _finish_folder(partial)
        complete = partial.replace(partial.with_suffix(_COMPLETE))
        _move_into_place(complete, target)
        _flush(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def finish_merge(target: Path) -> None:
    """Put the complete new files of a folder in place that a killed `merged_folder` left aside.

    Raises:
        UserError: A file would be moved out of the folder, through a link: that is not our doing.
    """
    for complete in target.glob(f".*{_COMPLETE}"):
        for path in (complete, *complete.rglob("*")):
            place = target / path.relative_to(complete)
            if path.is_symlink() or (place.is_symlink() and place.is_dir()):
                raise UserError(f"{complete} does not belong there: remove it")
        _move_into_place(complete, target)


def _move_into_place(complete: Path, target: Path) -> None:
    files = [path for path in complete.rglob("*") if path.is_file()]
    places = {target / path.relative_to(complete): path for path in files}
    weights = {(place.parent, _whole(place.name)) for place in places if _is_weights(place)}
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    # First all old files, so that old and new ones are never there together.
    for folder in {place.parent for place in places}:
        for old in folder.iterdir():
            if old in places or (_is_weights(old) and (folder, _whole(old.name)) in weights):
                old.unlink(missing_ok=True)
    for place, path in places.items():
        path.replace(place)
    shutil.rmtree(complete)


def _is_weights(path: Path) -> bool:
    return ".safetensors" in path.suffixes


def _whole(name: str) -> str:
    """The name that weights in shards, or their index, have in one file."""
    name = re.sub(r"-\d{5}-of-\d{5}", "", name)
    return re.sub(r"(\.\w+)\.index(\.\w+)?\.json$", r"\2\1", name)


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":  # has no signal 0
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder, or a link to one but not what it names.

    A kill leaves no incomplete folder under its name.
    """
    removed = _aside(folder, _REMOVED)
    folder.replace(removed)
    _remove(removed)


def remove_partial_writes(folder: Path) -> None:
    """Remove what killed processes left in a folder of ours; no process may be writing in it."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: not path.name.endswith((_OLD, ".old"))):
        earlier = _NAMES_OF_0_1_0.fullmatch(path.name)
        if earlier and earlier["end"] == "old":
            _restore(path, folder / earlier["target"])
        elif path.name.endswith(_OLD):
            _restore(path, folder / path.name.removeprefix(".").removesuffix(_OLD))
        if os.path.lexists(path) and (earlier or is_partial_write(path)):
            _remove(path)


def final_path(path: Path) -> Path:
    """The path that a file or folder will have when it, and what it is in, is complete."""
    aside, merged = (
        re.compile(rf"\.(.+){mark}[0-9a-f]{{8}}{re.escape(_PARTIAL)}") for mark in (r"\.", r"-\d+-")
    )
    parts = (part for part in Path(os.path.abspath(path)).parts if not merged.fullmatch(part))
    return Path(*(aside.sub(r"\1", part) for part in parts))


def is_partial_write(path: Path) -> bool:
    """Whether a path has one of the temporary names of this module."""
    return path.name.startswith(".") and path.name.endswith((_PARTIAL, _OLD, _REMOVED))


def _aside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{ending}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _restore(old: Path, target: Path) -> None:
    if old.exists() and not target.exists():
        old.replace(target)


def _finish_folder(folder: Path) -> None:
    """Give files the permissions that the umask left to the folder, and flush all to disk."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors makes files that only their owner may read
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Fsync a file or folder, so that a power loss cannot keep the rename and lose the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------
# Reading


def open_regular(
    path: Path, mode: str = "rb", follow_links: bool = False, **options: Any
) -> IO[Any]:
    """Open a file as `open` does, if it is a regular one.

    Pipes, devices and sockets are refused without waiting for them.

    Args:
        path: The file.
        mode: Mode of `open`.
        follow_links: Whether the file may be a symbolic link. Those of a run are not; those of
            a model from the Hub are links into its cache.
        **options: Further arguments of `open`.

    Raises:
        UserError: It is not a regular file, or a link that is not followed.
        OSError: As `open`.
    """

    def opener(name: str, flags: int) -> int:
        flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        if not follow_links:
            if os.path.islink(name):
                raise UserError(f"{path} is a symbolic link; expected a file")
            flags |= getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(name, flags, 0o666)
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            os.close(descriptor)
            if stat.S_ISDIR(kind):
                raise IsADirectoryError(f"{path} is a folder; expected a file")
            raise UserError(f"{path} is a pipe or a device; expected a file")
        return descriptor

    return open(path, mode, opener=opener, **options)


def read_bytes(path: Path, max_bytes: int, follow_links: bool = False) -> bytes:
    """Read a file of at most `max_bytes`.

    Raises:
        UserError: As `open_regular`, or the file is larger.
        OSError: It cannot be read.
    """
    with open_regular(path, follow_links=follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(data)) > max_bytes:
        raise UserError(f"{path} has {max(size, len(data))} bytes; the limit is {max_bytes}")
    return data


def read_text(path: Path, max_bytes: int, follow_links: bool = False) -> str:
    """Read a UTF-8 file of at most `max_bytes`; line ends are not translated.

    Raises:
        UserError: As `read_bytes`, or the file is not UTF-8.
        OSError: It cannot be read.
    """
    data = read_bytes(path, max_bytes, follow_links)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error


_TEXTS = (".json", ".txt", ".model", ".jinja", ".yaml", ".md")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_MAX_TEXT_BYTES = 256 * 2**20


def refuse_strange_files(folder: Path, follow_links: bool = True, depth: int = 3) -> None:
    """Look at the files of a model or checkpoint before a library reads them.

    A library would wait for a pipe and read a text without end. Hidden folders and files of other
    kinds are left alone.

    Args:
        folder: The folder; it may not exist.
        follow_links: Whether files may be symbolic links, as in the cache of the Hub.
        depth: Levels of folders, from this one.

    Raises:
        UserError: Naming a file that `open_regular` refuses, or a text of more than 256 MiB.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and depth > 1 and not path.name.startswith("."):
            refuse_strange_files(path, follow_links, depth - 1)
        elif path.name.endswith((*_TEXTS, *_WEIGHTS)):
            with open_regular(path, follow_links=follow_links) as file:
                size = os.fstat(file.fileno()).st_size
            if path.name.endswith(_TEXTS) and size > _MAX_TEXT_BYTES:
                raise UserError(f"{path} has {size} bytes; the limit is {_MAX_TEXT_BYTES}")
