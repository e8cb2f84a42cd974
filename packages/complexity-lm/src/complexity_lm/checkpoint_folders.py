"""The checkpoint folders of a run: their names, which stay, and which one a run goes on from."""

import logging
import re
from pathlib import Path

from complexity_lm.checksums import damage
from complexity_lm.errors import UserError
from complexity_lm.files import remove_folder
from complexity_lm.run_lock import LOCK_FILE

logger = logging.getLogger(__name__)

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
