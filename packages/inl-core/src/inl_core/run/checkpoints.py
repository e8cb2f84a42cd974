"""Checkpoint folders of a run: names, lock, checksums, and the choice of one to resume from.

RUN/.lock                             held while a process writes in RUN
RUN/checkpoints/step-00000100/        one checkpoint, complete: it is renamed when finished
RUN/checkpoints/step-00000100/SHA256SUMS
"""

import errno
import hashlib
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from inl_core.run.errors import UserError
from inl_core.run.files import remove_folder

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
SUMS_FILE = "SHA256SUMS"

_NAME = re.compile(r"step-(\d{8})")
_SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_HASH_THREADS = 4
_MAX_LISTED = 3


# ------------------------------------------------------------------------------------------------
# Names


def folder_of_step(checkpoints: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint, from the name of its folder.

    Raises:
        UserError: The folder is not called step-XXXXXXXX.
    """
    match = _NAME.fullmatch(checkpoint.name)
    if not match:
        raise UserError(f"--resume {checkpoint}: a checkpoint folder is called step-XXXXXXXX")
    return int(match[1])


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints in a folder, by step."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step in a folder, or None."""
    return next(reversed(all_checkpoints(checkpoints)), None)


def drop_old_checkpoints(checkpoints: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove old checkpoints.

    Args:
        checkpoints: Their folder.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        keep_every: Also keep those at a multiple of this many steps; 0 for none.
    """
    for old in all_checkpoints(checkpoints)[:-keep_last] if keep_last else []:
        if not keep_every or step_of(old) % keep_every:
            remove_folder(old)


# ------------------------------------------------------------------------------------------------
# Lock: one process at a time writes in a run's folder


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, also on other hosts if the file system can.

    An operating system lock on the file `.lock`: it ends with the process, however that ends, and
    is not inherited by worker processes. The file names its holder.

    Raises:
        UserError: Another process holds the lock (named with its host), or nothing can be written
            in the folder.
    """
    path, is_new = folder / LOCK_FILE, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except BlockingIOError as error:
        holder = path.read_text().strip() or "a process that has just started"
        raise UserError(
            f"{folder} is being written by another run, {holder}: wait for it or stop it, or "
            "choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error}; choose another --out") from error
    with file:
        try:
            file.truncate(0)
            start = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {start}\n")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


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
        file.close()  # the previous holder removed it in the meantime: a lock on it is worthless


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


# ------------------------------------------------------------------------------------------------
# Checksums: SHA256SUMS, in the format of coreutils (`sha256sum -c SHA256SUMS` checks a folder too).
# Its first line, a comment in that format, counts the files, so that a truncated list is detected.


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` for all files in and below a folder; to be written last."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SUMS_FILE
    )
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(lambda name: _sha256(folder / name), names))
    lines = [f"# SHA-256 of {len(names)} files"]
    lines += [f"{digest}  {name}" for digest, name in zip(digests, names, strict=True)]
    (folder / SUMS_FILE).write_text("\n".join(lines) + "\n")


def find_damage(folder: Path, part: Path = Path()) -> list[str]:
    """Compare the files of a folder with its `SHA256SUMS`.

    Args:
        folder: Folder with the list.
        part: Compare only the files in this relative folder; default: all.

    Returns:
        One phrase per damaged file. Empty if all are intact, or if the folder has no list:
        checkpoints of early versions had none.
    """
    if not (folder / SUMS_FILE).exists():
        return []
    try:
        expected = _read_sums(folder)
    except (OSError, ValueError) as error:
        return [f"{SUMS_FILE} cannot be read ({error})"]
    names = [name for name in expected if Path(name).is_relative_to(part)]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        results = pool.map(lambda name: _compare(folder / name, name, expected[name]), names)
        return [phrase for phrase in results if phrase]


def _read_sums(folder: Path) -> dict[str, str]:
    """Digest by file name; ValueError if the list was not written by `write_sums`."""
    head, *lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines() or [""]
    digests: dict[str, str] = {}
    for line in lines:
        match = _SUMS_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{line[:80]!r} is not a line of sha256sum")
        path = PurePosixPath(match[2])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{match[2][:80]!r} is outside the folder")
        digests[match[2]] = match[1]
    if head != f"# SHA-256 of {len(digests)} files":
        raise ValueError(f"{len(digests)} files are listed, but the first line is {head[:80]!r}")
    return digests


def _compare(path: Path, name: str, expected: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        current = _sha256(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if current == expected:
        return None
    return f"{name} is not what was written (SHA-256 {current[:12]}…)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------
# Resuming


def checkpoint_to_resume(out: Path, resume: str, state_file: str) -> Path | None:
    """Choose the checkpoint to resume from.

    A checkpoint named by its path may have damaged ones behind it: they are renamed. Intact ones
    behind it are an error, because the next ``--resume auto`` would take them.

    Args:
        out: Folder of the run, already cleared of partial writes.
        resume: "auto" (the latest checkpoint, if any), "none", or a checkpoint folder.
        state_file: Name of a file that every checkpoint has.

    Returns:
        The checkpoint, or None to start from scratch.

    Raises:
        UserError: The folder is in use by another run, or the checkpoint is not one, belongs to
            another run, is damaged, or has intact later ones.
    """
    if resume == "auto":
        newest = latest_checkpoint(out / "checkpoints")
        if newest is not None:
            _check_before_resume(newest)
        return newest
    occupied = out.exists() and (
        not out.is_dir() or any(path.name != LOCK_FILE for path in out.iterdir())
    )
    if resume == "none":
        if occupied:
            raise UserError(
                f"{out} exists; continue it with --resume auto, or choose another --out for a new "
                "run"
            )
        return None
    checkpoint = Path(resume)
    if not (checkpoint / state_file).is_file():
        raise UserError(f"--resume {checkpoint}: no checkpoint folder, it lacks {state_file}")
    if occupied and out.resolve() not in checkpoint.resolve().parents:
        raise UserError(f"{out} exists and {checkpoint} is not one of its checkpoints")
    _check_before_resume(checkpoint)
    if occupied:
        _set_aside_later(out / "checkpoints", checkpoint)
    return checkpoint


def check_damage(folder: Path) -> None:
    """Raise if a checkpoint, or a folder directly in one, is damaged.

    For folders that are sampled from or evaluated. Folders elsewhere have no checksums and pass.

    Raises:
        UserError: Naming the damaged files in `folder`.
    """
    if not folder.is_dir():
        return
    folder = folder.resolve()
    for checkpoint in (folder, folder.parent):
        if not _NAME.fullmatch(checkpoint.name):
            continue
        if damage := find_damage(checkpoint, folder.relative_to(checkpoint)):
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {_summary(damage)}; restore its files from a "
                "copy, or use another checkpoint"
            )


def _check_before_resume(checkpoint: Path) -> None:
    damage = find_damage(checkpoint)
    if not damage:
        return
    earlier = [path for path in all_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    intact = next((path for path in reversed(earlier) if not find_damage(path)), None)
    hint = (
        f"resume from the intact one before it with --resume {intact}"
        if intact
        else "there is no intact one before it: restore its files from a copy, or start again in "
        "another --out"
    )
    raise UserError(f"checkpoint {checkpoint} is damaged: {_summary(damage)}; {hint}")


def _set_aside_later(checkpoints: Path, checkpoint: Path) -> None:
    later = [path for path in all_checkpoints(checkpoints) if path.name > checkpoint.name]
    damaged = [path for path in later if find_damage(path)]
    if intact := [path.name for path in later if path not in damaged]:
        raise UserError(
            f"{checkpoints.parent} has later checkpoints than {checkpoint.name} "
            f"({', '.join(intact)}), which the next --resume auto would take: remove them to go "
            "back, or branch off with another --out"
        )
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        if aside.exists():
            remove_folder(aside)  # of an earlier run of the same step
        path.replace(aside)
        logger.warning("the damaged checkpoint %s is kept as %s", path, aside.name)


def _summary(damage: list[str]) -> str:
    more = len(damage) - _MAX_LISTED
    return "; ".join(damage[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
