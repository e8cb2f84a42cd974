"""What makes a language model's checkpoint that of this run."""

from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from complexity_lm.hub import first_line
from inl_core.run.errors import UserError
from inl_core.run.json_files import read_json_object


def check_dynamics(config: PreTrainedConfig, checkpoint: Path) -> None:
    """Refuse to go on with dynamics of another kind; tensors may have the same names and shapes.

    A run's own settings need not say which: the default has changed since 0.1.0, where it was
    `branch` with a controller a token.

    Args:
        config: Of the model that the run would go on with.
        checkpoint: A folder with a `config.json`.

    Raises:
        UserError: Placement or kind of the coefficients differ, or the file is unreadable.
    """
    try:
        theirs = read_json_object(checkpoint / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read checkpoint {checkpoint}: {first_line(error)}") from error
    differing = [
        f"{name} is {theirs[name]!r} there and {getattr(config, name)!r} here"
        for name in ("dynamics_placement", "dynamics_adaptive")
        if name in theirs and theirs[name] != getattr(config, name)
    ]
    if differing:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model: {'; '.join(differing)}; set them as "
            "--model.NAME VALUE or in the config, or use another --out"
        )


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
    except Exception as error:  # safetensors raises its own type, OSError, ValueError, …
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
