"""The lock on a folder: one process at a time writes in it, and the next is told which one."""

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from complexity_dit.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, also on other hosts where the file system can.

    The lock is the operating system's, on the file `.lock`: it ends with the process, however that
    ends, and worker processes do not inherit it. The file says who holds it.

    Raises:
        UserError: Naming the process and host that hold it, or if nothing can be written there.
    """
    path, is_new = folder / LOCK_FILE, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except BlockingIOError as error:
        holder = path.read_text().strip() or "a process that has just begun"
        raise UserError(
            f"{folder} is being written by another run, {holder}: wait for it or stop it, or "
            "choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error}; choose another --out") from error
    with file:
        try:
            file.truncate(0)
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()  # nothing came of it


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            _lock(file.fileno(), path)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its last holder removed it in between: a lock on it guards nothing


def _lock(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        logger.warning("no lock on this system: let no other run write in %s", path.parent)
        return
    import fcntl

    try:
        # lockf, not flock: a forked worker that outlives a killed run must not keep it locked.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(*error.args) from error
        logger.warning("no lock in %s (%s): let no other run write there", path.parent, error)
