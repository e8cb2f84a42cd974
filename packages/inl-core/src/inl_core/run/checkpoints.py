"""The checkpoint folders of a run: their names, which stay, and which one a run goes on from."""

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

# Checksums of a folder's files: what a disk, a copy or a stray hand did to them is named.
#
# `SHA256SUMS` has the form that coreutils writes, so `sha256sum -c SHA256SUMS` checks a folder too.
# Its first line, a comment there, counts the files: a list that lost its end is noticed.

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_THREADS = 4


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` of all files in a folder and below it; the last thing written there."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SUMS_FILE
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda name: _sha256(folder / name), names))
    lines = [f"# SHA-256 of {len(names)} files"]
    lines += [f"{digest}  {name}" for digest, name in zip(sums, names, strict=True)]
    (folder / SUMS_FILE).write_text("\n".join(lines) + "\n")


def damage(folder: Path, part: Path = Path()) -> list[str]:
    """What is wrong with the files that `SHA256SUMS` lists.

    Args:
        folder: Where `write_sums` wrote.
        part: A folder below it, whose files alone are compared; all by default.

    Returns:
        A phrase a damaged file, none where all are whole. A folder without the file was
        written before there were any and has nothing to compare with: none either.
    """
    if not (folder / SUMS_FILE).exists():
        return []
    try:
        wanted = _read_sums(folder)
    except (OSError, ValueError) as error:
        return [f"{SUMS_FILE} cannot be read ({error})"]
    names = [name for name in wanted if Path(name).is_relative_to(part)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _wrong(folder / name, name, wanted[name]), names)
        return [phrase for phrase in found if phrase]


def _read_sums(folder: Path) -> dict[str, str]:
    """Digest by name; ValueError for what `write_sums` did not write."""
    head, *lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines() or [""]
    wanted: dict[str, str] = {}
    for line in lines:
        parts = _LINE.fullmatch(line)
        if not parts:
            raise ValueError(f"{line[:80]!r} is no line of sha256sum")
        path = PurePosixPath(parts[2])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{parts[2][:80]!r} is outside of the folder")
        wanted[parts[2]] = parts[1]
    if head != f"# SHA-256 of {len(wanted)} files":
        raise ValueError(f"{head[:80]!r} stands above {len(wanted)} files")
    return wanted


def _wrong(path: Path, name: str, digest: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        found = _sha256(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return None if found == digest else f"{name} is not what was written (SHA-256 {found[:12]}…)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The lock on a folder: one process at a time writes in it, and the next is told which one.

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
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


_NAME = re.compile(r"step-(\d{8})")


def folder_of_step(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its folder's name.

    Raises:
        UserError: The folder has another kind of name.
    """
    found = _NAME.fullmatch(checkpoint.name)
    if not found:
        raise UserError(f"--resume {checkpoint}: a checkpoint folder is called step-XXXXXXXX")
    return int(found[1])


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints in a folder, by step. A folder of that name was written to its end."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the most steps in a folder, or None."""
    found = all_checkpoints(checkpoints)
    return found[-1] if found else None


def drop_old_checkpoints(checkpoints: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove checkpoints that are neither among the newest nor at a step to keep for ever.

    Args:
        checkpoints: Their folder.
        keep_last: How many of the newest stay; 0 keeps all.
        keep_every: Those at a multiple of this many steps stay; 0 for none.
    """
    for old in all_checkpoints(checkpoints)[:-keep_last] if keep_last else []:
        if not keep_every or step_of(old) % keep_every:
            remove_folder(old)


def checkpoint_to_resume(out: Path, resume: str, state_file: str) -> Path | None:
    """The checkpoint that `resume` names, or None for a fresh start in a folder that is free.

    Args:
        out: Folder of the run; what a killed run left half-written is cleared already.
        resume: auto, none or a checkpoint folder.
        state_file: A file that a checkpoint has.

    Raises:
        UserError: The run's folder is taken, or the checkpoint is none, another run's, damaged, or
            has later ones behind it.
    """
    if resume == "auto":
        newest = latest_checkpoint(out / "checkpoints")
        if newest is not None:
            refuse_damage(newest)
        return newest
    occupied = out.exists() and (
        not out.is_dir() or any(path.name != LOCK_FILE for path in out.iterdir())
    )
    if resume == "none":
        if occupied:
            raise UserError(
                f"{out} exists; go on with --resume auto, or choose another --out for a new run"
            )
        return None
    checkpoint = Path(resume)
    if not (checkpoint / state_file).is_file():
        raise UserError(f"--resume {checkpoint} is no checkpoint folder (no {state_file} in it)")
    if occupied and out.resolve() not in checkpoint.resolve().parents:
        raise UserError(f"{out} exists and {checkpoint} is not one of its checkpoints")
    refuse_damage(checkpoint)
    if occupied:
        _clear_the_way(out / "checkpoints", checkpoint)
    return checkpoint


def refuse_damage(checkpoint: Path) -> None:
    """Stop before damaged files are read.

    Raises:
        UserError: Naming what is damaged, and the newest whole checkpoint before it.
    """
    wrong = damage(checkpoint)
    if not wrong:
        return
    earlier = [path for path in all_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    whole = next((path for path in reversed(earlier) if not damage(path)), None)
    raise UserError(
        f"checkpoint {checkpoint} is damaged: {_listed(wrong)}"
        + (
            f"; go on from the whole one before it with --resume {whole}"
            if whole
            else "; no whole one lies before it: put its files back from a copy, or start anew in "
            "another --out"
        )
    )


def refuse_damage_in_use(folder: Path) -> None:
    """Stop before a checkpoint, or a folder in one, is sampled from or evaluated damaged.

    Folders elsewhere have no checksums: there is nothing to compare with.

    Raises:
        UserError: Naming what is damaged of what would be read.
    """
    if not folder.is_dir():
        return
    folder = folder.resolve()
    for checkpoint in (folder, folder.parent):
        if _NAME.fullmatch(checkpoint.name) and (
            wrong := damage(checkpoint, folder.relative_to(checkpoint))
        ):
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {_listed(wrong)}; put its files back from a "
                "copy, or take another checkpoint"
            )


def _listed(wrong: list[str]) -> str:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more


def _clear_the_way(checkpoints: Path, checkpoint: Path) -> None:
    """Let a run go back behind damaged checkpoints, but not behind whole ones without a word."""
    later = [path for path in all_checkpoints(checkpoints) if path.name > checkpoint.name]
    damaged = [path for path in later if damage(path)]
    if whole := [path.name for path in later if path not in damaged]:
        raise UserError(
            f"{checkpoints.parent} has later checkpoints than {checkpoint.name} "
            f"({', '.join(whole)}), which the next --resume auto would take: remove them to go "
            "back, or branch off with another --out"
        )
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        if aside.exists():
            remove_folder(aside)  # of an earlier accident at the same step
        path.replace(aside)
        logger.warning("the damaged checkpoint %s is kept as %s", path, aside.name)
