"""Folders that a command writes to: only its own ones, and one process at a time.

FOLDER/.KIND    marks a folder that a command has written, such as .complexity-dit-run
FOLDER/.lock    held while a process writes in it
"""

import errno
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder, is_partial_write, open_regular, read_text
from inl_core.run.json_files import read_json_object

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_HOLDER = re.compile(r"process \d+ on .*\n?")
_MAX_HOLDER_BYTES = 1000


@contextmanager
def claim_folder(
    folder: Path,
    kind: str,
    also: tuple[str, ...] = (),
    is_earlier: Callable[[Path], bool] = lambda folder: False,
) -> Iterator[None]:
    """Lock a folder to write in it, if it is new, empty, or was written by the same command.

    Nothing of any other folder is touched.

    Args:
        folder: The folder; it is made if it does not exist, and removed if it stays empty.
        kind: What the command writes, e.g. "complexity-dit-run"; the folder is marked as such.
        also: Other kinds that it may be.
        is_earlier: Whether a folder without a mark is one of a version that did not write marks.

    Raises:
        UserError: The folder has other content, another process writes in it (named with its host),
            or nothing can be written in it.
    """
    mark, kinds = folder / f".{kind}", (kind, *also)

    def check() -> None:
        try:
            names = {path.name for path in folder.iterdir() if not is_partial_write(path)}
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error}; choose another --out") from error
        is_marked = any(f".{kind}" in names for kind in kinds)
        if names <= {LOCK_FILE} or is_marked or is_earlier(folder):
            return
        examples = ", ".join(sorted(names)[:3])
        raise UserError(
            f"{folder} exists and is not one that this command has written (no {mark.name} in it; "
            f"it has {examples}): choose another --out"
        )

    check()
    with lock_folder(folder):
        check()  # again: another process may have been faster
        is_new = {path.name for path in folder.iterdir()} <= {LOCK_FILE}
        try:
            with writing(folder):
                if not any((folder / f".{kind}").exists() for kind in kinds):
                    mark.write_text(f"Files of a {kind} in this folder may be replaced.\n")
                yield
        finally:
            if is_new and {path.name for path in folder.iterdir()} == {LOCK_FILE, mark.name}:
                mark.unlink()


def has_result(folder: Path) -> bool:
    """Whether the `result.json` in a folder is that of a run or an evaluation of any version."""
    try:
        return {"metrics", "settings"} <= read_json_object(folder / "result.json").keys()
    except (OSError, ValueError):
        return False


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes a new folder if the block succeeds.

    Raises:
        UserError: The folder exists, or cannot be written, which is found out at the start.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --out")
    with writing(folder), atomic_folder(folder, replace=False) as partial:
        yield partial


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
_NATIVE_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Report a full, read-only or failing disk in one line while something is written.

    Raises:
        UserError: "cannot write TARGET: ...", in place of an `OSError`, or of an error of another
            type by which safetensors and tokenizers report one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        native = _NATIVE_ERROR.search(str(error))
        number = int(native[1]) if native else getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"{error}: raise the limit of open files (ulimit -n 1024)") from error
        if number not in (*_FULL, *_DENIED, errno.EIO):
            raise
        name = getattr(error, "filename", None)
        place = os.path.abspath(target.parent)
        if isinstance(name, str) and not Path(os.path.abspath(name)).is_relative_to(place):
            raise  # a file elsewhere, which is read
        hint = "free space" if number in _FULL else "make it writable"
        raise UserError(
            f"cannot write {target}: {error}; {hint}, or choose another --out"
        ) from error


_held: dict[Path, int] = {}  # locked folder: thread


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, also on other hosts if the file system can.

    An operating system lock on the file `.lock`: it ends with the process, however that ends, and
    is not inherited by worker processes. The file names its holder. A thread may lock a folder
    again while it holds the lock.

    Raises:
        UserError: Another process or thread holds the lock (named with its host), or nothing can be
            written in the folder.
    """
    key, thread = Path(os.path.realpath(folder)), threading.get_ident()
    if _held.get(key) == thread:
        yield
        return
    if _held.setdefault(key, thread) != thread:
        raise UserError(
            f"{folder} is being written by another thread of this process; choose another --out"
        )
    try:
        with _lock_between_processes(folder):
            yield
    finally:
        del _held[key]


@contextmanager
def _lock_between_processes(folder: Path) -> Iterator[None]:
    path, is_new = folder / LOCK_FILE, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except BlockingIOError as error:
        holder = read_text(path, _MAX_HOLDER_BYTES).strip() or "a process that has just started"
        raise UserError(
            f"{folder} is being written by another run, {holder}: wait for it or stop it, or "
            "choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error}; choose another --out") from error
    with file:
        try:
            start = time.strftime("%Y-%m-%d %H:%M:%S")
            with writing(folder):
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {start}\n")
                file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _open_locked(path: Path) -> IO[str]:
    """Open a lock file that is new and locked; an existing file is never written to."""
    while True:
        file = open_regular(path, "a+", errors="replace")
        try:
            _lock(file.fileno(), path)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0)
                text = file.read(_MAX_HOLDER_BYTES)
                if not text:
                    return file
                if not _HOLDER.fullmatch(text):
                    raise UserError(
                        f"{path} is not the lock of a run: move it away, or choose another --out"
                    )
                path.unlink()  # of a process that was killed
        except BaseException:
            file.close()
            raise
        file.close()  # another process removed it in the meantime: a lock on it is worthless


def _lock(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        logger.warning("no file locks on this system: let no other run write in %s", path.parent)
        return
    import fcntl

    try:
        # lockf, not flock: a forked worker that outlives a killed run must not keep the lock.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(*error.args) from error
        logger.warning("cannot lock %s (%s): let no other run write there", path.parent, error)
