"""The folder of a run and its checkpoints: names, checksums, and the choice of one to resume from.

RUN/checkpoints/step-00000100/        one checkpoint, complete: it is renamed when finished
RUN/checkpoints/step-00000100/SHA256SUMS
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from inl_core.run.errors import UserError
from inl_core.run.files import (
    open_regular,
    read_text,
    refuse_strange_files,
    remove_folder,
    remove_partial_writes,
)
from inl_core.run.folders import LOCK_FILE, claim_folder

logger = logging.getLogger(__name__)

SUMS_FILE = "SHA256SUMS"

_LOG_HEAD = "step,loss,grad_norm,lr"  # of the train_log.csv of every version and both packages
_NAME = re.compile(r"step-(\d{8})")
_SUMS_HEAD = re.compile(r"# SHA-256 of (\d{1,9}) files(?:, (\d{1,18}) bytes)?")
_SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_HASH_THREADS = 4
_MAX_LISTED = 3
_MAX_SUMS_BYTES = 64 * 2**20


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
    return sorted(
        path
        for path in checkpoints.iterdir()
        if _NAME.fullmatch(path.name) and (path.is_dir() or path.is_symlink())
    )


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step in a folder, or None."""
    return next(reversed(all_checkpoints(checkpoints)), None)


def drop_old_checkpoints(
    checkpoints: Path, keep_last: int, keep_every: int = 0, kept: Container[int] = ()
) -> None:
    """Remove old checkpoints.

    Args:
        checkpoints: Their folder.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        keep_every: Also keep those at a multiple of this many steps; 0 for none.
        kept: Also keep those of these steps.
    """
    for old in all_checkpoints(checkpoints)[:-keep_last] if keep_last else []:
        step = step_of(old)
        if step not in kept and (not keep_every or step % keep_every):
            remove_folder(old)


# ------------------------------------------------------------------------------------------------
# Checksums: SHA256SUMS, in the format of coreutils (`sha256sum -c SHA256SUMS` checks a folder too).
# Its first line, a comment in that format, counts files and bytes: a truncated list is detected,
# and a file larger than all of them is not read.


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` for all files in and below a folder; to be written last."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SUMS_FILE
    )
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(lambda name: _sha256(folder / name), names))
    size = sum((folder / name).stat().st_size for name in names)
    lines = [f"# SHA-256 of {len(names)} files, {size} bytes"]
    lines += [f"{digest}  {name}" for digest, name in zip(digests, names, strict=True)]
    (folder / SUMS_FILE).write_text("\n".join(lines) + "\n")


def find_damage(folder: Path, part: Path = Path()) -> list[str]:
    """Compare the files of a folder with its `SHA256SUMS`.

    Args:
        folder: Folder with the list.
        part: Compare only the files in this relative folder; default: all.

    Returns:
        One phrase per damaged file. Empty if all are intact. Without a list, as in checkpoints of
        early versions, only files that are no regular ones count.
    """
    if not folder.is_dir():
        return ["it is a link to a folder that does not exist"]
    if not os.path.lexists(folder / SUMS_FILE):
        try:
            refuse_strange_files(folder, follow_links=False)
        except UserError as error:
            return [str(error)]
        return []
    try:
        expected, size = _read_sums(folder)
    except (OSError, ValueError) as error:
        return [f"{SUMS_FILE} cannot be read ({error})"]
    names = [name for name in expected if Path(name).is_relative_to(part)]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        results = pool.map(lambda name: _compare(folder / name, name, expected[name], size), names)
        return [phrase for phrase in results if phrase]


def _read_sums(folder: Path) -> tuple[dict[str, str], int | None]:
    """Digest by file name, and bytes of all files (None in lists of version 0.1.0).

    ValueError if the list was not written by `write_sums`.
    """
    text = read_text(folder / SUMS_FILE, _MAX_SUMS_BYTES)
    head, *lines = text.splitlines() or [""]
    digests: dict[str, str] = {}
    for line in lines:
        match = _SUMS_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{line[:80]!r} is not a line of sha256sum")
        path = PurePosixPath(match[2])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{match[2][:80]!r} is outside the folder")
        digests[match[2]] = match[1]
    match = _SUMS_HEAD.fullmatch(head)
    if not match or int(match[1]) != len(digests):
        raise ValueError(f"{len(digests)} files are listed, but the first line is {head[:80]!r}")
    return digests, int(match[2]) if match[2] else None


def _compare(path: Path, name: str, expected: str, size: int | None) -> str | None:
    try:
        if size is not None and path.lstat().st_size > size:
            return f"{name} is not what was written ({path.lstat().st_size} bytes)"
        current = _sha256(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except UserError as error:
        return f"{name} is not what was written ({error})"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if current == expected:
        return None
    return f"{name} is not what was written (SHA-256 {current[:12]}…)"


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore (a binary file)


# ------------------------------------------------------------------------------------------------
# Resuming


@contextmanager
def claim_run(out: Path, state_file: str, kind: str) -> Iterator[None]:
    """Lock the folder of a run, as `claim_folder` does; those of version 0.1.0 have no mark."""
    with claim_folder(out, kind, is_earlier=partial(_is_run_of_0_1_0, state_file=state_file)):
        yield


@contextmanager
def open_run_folder(
    out: Path,
    resume: str,
    state_file: str,
    kind: str,
    on_main: Callable[[Callable[[], Path | None]], Path | None],
) -> Iterator[Path | None]:
    """Lock the folder of a run and remove what a killed process left half-written in it.

    Args:
        out: The folder.
        resume: As in `checkpoint_to_resume`.
        state_file: Name of a file that every checkpoint has.
        kind: Mark of the folder, see `claim_folder`.
        on_main: Calls a function in the main process, which then holds the lock, and returns its
            result in all processes.

    Yields:
        The checkpoint to resume from, its checksums verified; None for a new run.

    Raises:
        UserError: The folder is not one of a run, another process writes there, or as in
            `checkpoint_to_resume`.
    """
    with ExitStack() as held:

        def claim() -> Path | None:
            held.enter_context(claim_run(out, state_file, kind))
            for folder in (out, out / "checkpoints", out / "samples"):
                remove_partial_writes(folder)
            return checkpoint_to_resume(out, resume, state_file, kind)

        yield on_main(claim)


def _is_run_of_0_1_0(folder: Path, state_file: str) -> bool:
    """Whether a folder has a checkpoint or the log of a run: version 0.1.0 left no mark."""
    if any((path / state_file).is_file() for path in all_checkpoints(folder / "checkpoints")):
        return True
    try:
        with open_regular(folder / "train_log.csv") as file:
            return file.read(len(_LOG_HEAD)) == _LOG_HEAD.encode()
    except (OSError, UserError):
        return False


def checkpoint_to_resume(out: Path, resume: str, state_file: str, kind: str = "") -> Path | None:
    """Choose the checkpoint to resume from.

    A checkpoint named by its path may have damaged ones behind it: they are renamed. Intact ones
    behind it are an error, because the next ``--resume auto`` would take them.

    Args:
        out: Folder of the run, already cleared of partial writes.
        resume: "auto" (the latest checkpoint, if any), "none", or a checkpoint folder.
        state_file: Name of a file that every checkpoint has.
        kind: Mark of the folder, which may be there already.

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
        not out.is_dir() or any(path.name not in (LOCK_FILE, f".{kind}") for path in out.iterdir())
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
