"""Model folders: what training leaves, and how every command opens one.

A model folder is a transformers folder (safetensors, tokenizer) with one file more: `training.json`
says which text and tokenizer it was trained with, so that an evaluation holds out the same
documents and a foreign tokenizer is refused.
"""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from complexity_lm.data import DataConfig
from complexity_lm.hub import first_line, is_local, require_hub
from complexity_lm.tokenizer import check_tokenizer, load_tokenizer, tokenizer_hash
from inl_core.run.checkpoints import refuse_damage_in_use
from inl_core.run.errors import UserError
from inl_core.run.json_files import filled, fits, read_json_object

# What makes a language model's checkpoint that of this run.


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


TRAINING_FILE = "training.json"
"""In a model folder: the text and the tokenizer it was trained with."""


@dataclass
class Loaded:
    """A model ready to use.

    Attributes:
        model: In evaluation mode, on its device.
        tokenizer: The one it was trained with.
        data: The text it was trained on, None when the folder does not say.
        name: What the user asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    data: DataConfig | None
    name: str

    @property
    def context(self) -> int:
        """The longest sequence the model is meant for, in tokens."""
        return int(self.model.config.max_position_embeddings)


def load(name: str, tokenizer: str | None = None, device: str = "auto") -> Loaded:
    """Open a model and its tokenizer.

    Args:
        name: A model folder, a run's folder (its `model/` is taken), a checkpoint, or a hub id of
            any causal language model.
        tokenizer: Another folder or hub id for the tokenizer; the model's own by default.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N.

    Raises:
        UserError: It is not there, cannot be read, a damaged checkpoint, or model and tokenizer do
            not belong together.
    """
    target = torch.device(_device(device))
    folder = name
    if is_local(name):
        folder = str(_model_folder(Path(name).expanduser()))
        refuse_damage_in_use(Path(folder))
    else:
        require_hub(name, "give the path of a model folder")
    try:
        # No pickle is opened and no code of the folder runs; without the second argument
        # transformers would ask at the terminal.
        if is_local(name):
            _check_layers(Path(folder))
        model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        _check_found(found)
    # transformers checks few of the values of a config.json: what it raises then is of any type.
    except Exception as error:
        raise UserError(f"cannot load a model from {name}: {first_line(error)}") from error
    data, trained_with = read_training_file(Path(folder))
    own = load_tokenizer(tokenizer or folder)
    check_tokenizer(own, model.config, trained_with)
    model.to(target)  # pyright: ignore[reportArgumentType] — transformers wraps nn.Module.to
    return Loaded(model.eval(), own, data, name)


def _check_layers(folder: Path) -> None:
    """Refuse a config of more layers than its weights have tensors, before they are built."""
    config = read_json_object(folder / "config.json")
    tensors = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors += len(file.keys())
    for key, value in config.items():
        if "layer" in key and isinstance(value, int) and tensors and value > tensors:
            raise UserError(f"config.json asks for {key} {value}, and there are {tensors} tensors")


def _check_found(found: dict[str, Any]) -> None:
    """transformers draws at random what is missing, and says so in a log only."""
    lost = [f"{name} is missing" for name in sorted(found.get("missing_keys", ()))]
    lost += [f"{name} is unknown" for name in sorted(found.get("unexpected_keys", ()))]
    if lost:
        raise UserError(f"the weights are not those of config.json: {'; '.join(lost[:3])}")


def _model_folder(folder: Path) -> Path:
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if not (folder / "config.json").is_file():
        missing = "has no config.json" if folder.is_dir() else "is not there"
        raise UserError(
            f"{folder} {missing}: give a model folder, the folder of a run, or a checkpoint"
        )
    return folder


def read_training_file(folder: Path) -> tuple[DataConfig | None, str | None]:
    """The text and the `tokenizer_hash` that a model was trained with, where its folder says.

    Raises:
        UserError: The file is there and says something else.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None, None
    try:
        told = read_json_object(path)
        trained_with = told.get("tokenizer_sha256")
        if not fits(trained_with, str | None):
            raise ValueError("tokenizer_sha256 is no text")
        return filled(DataConfig, told["data"]) if "data" in told else None, trained_with
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not say what was trained on: {error}") from error


def write_training_file(folder: Path, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Say in a model folder which text and tokenizer it was trained with."""
    content = {"data": asdict(data), "tokenizer_sha256": tokenizer_hash(tokenizer)}
    (folder / TRAINING_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, and no GPU can be used here; take auto or cpu")
    return name


def weights_hash(model: torch.nn.Module) -> str:
    """A sha256 of every parameter's name, type, shape and bytes."""
    whole = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        whole.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        whole.update(flat.numpy().tobytes())
    return whole.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a measured number depends on."""
    found = {"python": platform.python_version()}
    for name in (
        "complexity-lm", "inl-core", "torch", "transformers", "tokenizers", "datasets", "lm_eval",
    ):  # fmt: skip
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
