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
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from complexity_lm.data import DataConfig
from complexity_lm.errors import UserError
from complexity_lm.hub import first_line, is_local, require_hub
from complexity_lm.tokenizer import check_tokenizer, load_tokenizer, tokenizer_hash

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
        UserError: It is not there, cannot be read, or model and tokenizer do not belong together.
    """
    target = torch.device(_device(device))
    folder = name
    if is_local(name):
        folder = str(_model_folder(Path(name).expanduser()))
    else:
        require_hub(name, "give the path of a model folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {name}: {first_line(error)}") from error
    told = _read_training_file(Path(folder))
    own = load_tokenizer(tokenizer or folder)
    check_tokenizer(own, model.config, told.get("tokenizer_sha256"))
    try:
        data = DataConfig(**told["data"]) if "data" in told else None
    except TypeError as error:
        raise UserError(f"{Path(folder) / TRAINING_FILE} is no DataConfig: {error}") from error
    model.to(target)  # pyright: ignore[reportArgumentType] — transformers wraps nn.Module.to
    return Loaded(model.eval(), own, data, name)


def _model_folder(folder: Path) -> Path:
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if not (folder / "config.json").is_file():
        missing = "has no config.json" if folder.is_dir() else "is not there"
        raise UserError(
            f"{folder} {missing}: give a model folder, the folder of a run, or a checkpoint"
        )
    return folder


def _read_training_file(folder: Path) -> dict[str, Any]:
    path = folder / TRAINING_FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


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
