"""The folder of a run: one run at a time writes in it, and where that run goes on from."""

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from complexity_dit.errors import UserError
from complexity_dit.files import recover
from complexity_dit.processes import Processes
from complexity_dit.state import all_checkpoints, latest_checkpoint

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def claimed_folder(out: Path, resume: str, processes: Processes) -> Iterator[Path | None]:
    """Hold a run's folder for this run, cleared of what a killed one left half-written.

    Args:
        out: The folder; made if it is not there.
        resume: auto, none, or a checkpoint folder.
        processes: Of the run; the main one holds the folder.

    Yields:
        The checkpoint to go on from, None for a fresh start.

    Raises:
        UserError: Another run writes there, the folder is not free, or there is no such checkpoint.
    """
    with ExitStack() as held:

        def claim() -> Path | None:
            if resume not in ("auto", "none") and not (Path(resume) / "state.json").is_file():
                raise UserError(f"--resume {resume} is no checkpoint folder (no state.json in it)")
            held.enter_context(run_lock(out))
            for folder in (out, out / "checkpoints", out / "samples"):
                recover(folder)
            return _checkpoint_to_resume(out, resume)

        yield processes.on_main(claim)


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


def _checkpoint_to_resume(out: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names, or None for a fresh start in a folder that is free."""
    newest = latest_checkpoint(out / "checkpoints")
    if resume == "auto":
        return newest
    occupied = any(path.name != LOCK_FILE for path in out.iterdir())
    if resume == "none":
        if occupied:
            raise UserError(
                f"{out} exists; go on with --resume auto, or choose another --out for a new run"
            )
        return None
    checkpoint = Path(resume)
    if not occupied:
        return checkpoint
    if out.resolve() not in checkpoint.resolve().parents:
        raise UserError(f"{out} exists and {checkpoint} is not one of its checkpoints")
    if newest is not None and newest.name > checkpoint.name:
        later = [path.name for path in all_checkpoints(out / "checkpoints")]
        later = later[later.index(checkpoint.name) + 1 :] if checkpoint.name in later else later
        raise UserError(
            f"{out} has later checkpoints than {checkpoint.name} ({', '.join(later)}), which the "
            "next --resume auto would take: remove them to go back, or branch off with another "
            "--out"
        )
    return checkpoint
