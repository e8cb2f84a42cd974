"""The checkpoint folders of a run: their names, which is the last, which one to resume."""

import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from complexity_lm.errors import UserError
from complexity_lm.hub import first_line

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
    """Whole checkpoints in a folder, by step."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the most steps in a folder, or None."""
    found = all_checkpoints(checkpoints)
    return found[-1] if found else None


def drop_old_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; 0 keeps all."""
    for old in all_checkpoints(checkpoints)[:-keep_last] if keep_last else []:
        shutil.rmtree(old)


def checkpoint_to_resume(resume: str, out: Path) -> Path | None:
    """The checkpoint that `resume` names, or None for a fresh start in a folder that is free.

    Args:
        resume: auto, none or a checkpoint folder.
        out: Folder of the run.

    Raises:
        UserError: The run's folder is taken, or the checkpoint is none or another run's.
    """
    if resume == "auto":
        return latest_checkpoint(out / "checkpoints")
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if resume == "none":
        if occupied:
            raise UserError(
                f"{out} exists; go on with --resume auto, or choose another --out for a new run"
            )
        return None
    checkpoint = Path(resume)
    if not (checkpoint / "trainer_state.json").is_file():
        raise UserError(f"--resume {checkpoint} is no checkpoint folder (no trainer_state.json)")
    if occupied and out.resolve() not in checkpoint.resolve().parents:
        raise UserError(f"{out} exists and {checkpoint} is not one of its checkpoints")
    return checkpoint


def check_shapes(model: nn.Module, checkpoint: Path) -> None:
    """Refuse the weights of another model; Trainer would load what fits and warn about the rest.

    Raises:
        UserError: Weights are missing, unknown or of another shape, or a file is unreadable.
    """
    theirs: dict[str, list[int]] = {}
    files = sorted(checkpoint.glob("*.safetensors"))
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                theirs |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read checkpoint {checkpoint}: {first_line(error)}") from error
    if not files:
        raise UserError(f"cannot read checkpoint {checkpoint}: it has no safetensors file")
    own = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    known = set(model.state_dict())
    differences = [
        f"{name} is {tuple(theirs[name])} there and {tuple(shape)} here"
        for name, shape in own.items()
        if name in theirs and theirs[name] != shape
    ]
    differences += [f"{name} is missing" for name in own if name not in theirs]
    differences += [f"{name} is unknown" for name in theirs if name not in known]
    if differences:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the config it was trained with, or another --out"
        )
