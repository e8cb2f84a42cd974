"""Model folders: what training writes into them, and how every command opens one.

A model folder is a transformers folder (safetensors, tokenizer) with one additional file:
`training.json` contains the text settings and the tokenizer hash of the training, so that an
evaluation holds out the same documents and rejects another tokenizer.
"""

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from complexity_lm.adapters import ADAPTER_FILE, base_of, is_adapter, load_adapter
from complexity_lm.config import SHIPPED, DataConfig
from complexity_lm.configuration_complexity import DeepConfig
from complexity_lm.hub import locate, report_errors
from complexity_lm.tokenizer import check_tokenizer, load_tokenizer, tokenizer_hash
from inl_core.run.checkpoints import check_damage, latest_checkpoint
from inl_core.run.errors import UserError
from inl_core.run.files import finish_merge, refuse_strange_files
from inl_core.run.hub import download_weights
from inl_core.run.json_files import filled, fits, read_json_object
from inl_core.run.shipped import shipped
from inl_core.run.torch_files import check_torch_files
from inl_core.run.weights import tensor_shapes, weights_fit

logger = logging.getLogger(__name__)

TRAINING_FILE = "training.json"
"""In a model folder: the text and the tokenizer of its training."""

_TOKENIZER_FILES = ("*.txt", "*.model", "*.jinja")
"""Beside JSON files: vocabularies, and the template of chats."""


@dataclass
class Loaded:
    """A model in evaluation mode, the name it was loaded by, and its tokenizer.

    `data` is the text it was trained on; None if the folder does not contain it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    data: DataConfig | None
    name: str

    @property
    def context(self) -> int:
        """Longest sequence that the model is made for, in tokens."""
        return int(self.model.config.max_position_embeddings)


def load(name: str, tokenizer: str | None = None, device: str = "auto") -> Loaded:
    """Load a model and its tokenizer; no pickle is opened and no code of the folder is run.

    Args:
        name: A model folder, a run's folder (its `model/` or `adapter/`, else its newest
            checkpoint), a checkpoint, a name of `SHIPPED`, or a Hub id, of any causal language
            model or of a LoRA adapter, which is loaded with the model that it names.
        tokenizer: Another folder or Hub id for the tokenizer; the model's own by default.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N.

    Raises:
        UserError: It does not exist, cannot be read, is a damaged checkpoint, or the tokenizer does
            not belong to the model.
    """
    target = _device(device)
    own = folder = find_model(name)
    # transformers validates few values of a config.json and raises errors of any type.
    with report_errors(f"cannot load a model from {name}"):
        refuse_strange_files(own)
        if is_adapter(own):
            folder = find_model(base_of(own))
            refuse_strange_files(folder)
        _check_folder(folder)
        # trust_remote_code is given because the default asks on the terminal.
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        # transformers initialises missing weights at random and only logs a warning.
        differences = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        differences += [f"{key} is unknown" for key in sorted(info["unexpected_keys"])]
        if differences:
            raise UserError(f"the weights do not match config.json: {'; '.join(differences[:3])}")
        if own != folder:
            load_adapter(model, own)
    data, trained_with = read_training_file(own)
    with_tokenizer = own if (own / "tokenizer_config.json").exists() else folder
    reader = load_tokenizer(tokenizer or with_tokenizer)
    check_tokenizer(reader, model.config, trained_with)
    model.to(target)  # pyright: ignore[reportArgumentType] — transformers wraps nn.Module.to
    return Loaded(model.eval(), reader, data, name)


def find_model(name: str) -> Path:
    """The folder of a model or adapter that a name means, as for `load`; the Hub's in the cache.

    Raises:
        UserError: There is none, or it is a damaged checkpoint.
    """
    name = shipped(name, SHIPPED)
    folder = locate(name, "give the path of a model folder")
    if folder is None:
        with report_errors(f"cannot load a model from {name}"):
            return download_weights(name, {}, [*_TOKENIZER_FILES, "adapter_model.safetensors"])
    folder = _model_folder(folder)
    check_damage(folder)
    return folder


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but no GPU is available; use auto or cpu")
    return device


def _model_folder(folder: Path) -> Path:
    finish_merge(folder)
    for part, file in (("model", "config.json"), ("adapter", ADAPTER_FILE)):
        if (folder / part / file).is_file():
            return folder / part
    if newest := latest_checkpoint(folder / "checkpoints"):
        logger.info("%s is not finished: taking its newest checkpoint", folder)
        return newest
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        problem = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {problem}: give a model folder, the folder of a run, or a checkpoint"
        )
    return folder


def _check_folder(folder: Path) -> None:
    """Refuse an adapter in the folder, and weights that cannot fill the network of their config."""
    if (folder / ADAPTER_FILE).exists():
        raise UserError(
            f"it has an adapter ({ADAPTER_FILE}), which is not loaded: merge it into the model "
            "with peft's merge_and_unload and save that"
        )

    def build(_: dict[str, Any]) -> nn.Module:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(own, trust_remote_code=False)

    weights_fit(folder, build)


# The training file ------------------------------------------------------------------------------


def read_training_file(folder: Path) -> tuple[DataConfig | None, str | None]:
    """Read the text settings and the `tokenizer_hash` that a model was trained with, if present.

    Raises:
        UserError: The file exists and has other content.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None, None
    with report_errors(f"cannot read {path}", kinds=(OSError, ValueError)):
        content = read_json_object(path)
        trained_with = content.get("tokenizer_sha256")
        if not fits(trained_with, str | None):
            raise ValueError(f"tokenizer_sha256 is {trained_with!r}, expected a string")
        return filled(DataConfig, content["data"]) if "data" in content else None, trained_with


def write_training_file(folder: Path, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Record in a model folder the text and the tokenizer that it was trained with."""
    content = {"data": asdict(data), "tokenizer_sha256": tokenizer_hash(tokenizer)}
    (folder / TRAINING_FILE).write_text(json.dumps(content, indent=2) + "\n")


# Repetitions ------------------------------------------------------------------------------------


@contextmanager
def repeating(loaded: Loaded, num_loops: int | None) -> Iterator[None]:
    """Let a model repeat its loop so often, in everything that is done with it inside.

    None leaves it as it is.

    Raises:
        UserError: The number is below 1, or the model has no loop.
    """
    config = loaded.model.config
    if num_loops is None:
        yield
        return
    if not isinstance(config, DeepConfig):
        raise UserError(f"num_loops {num_loops}: {loaded.name} is a model without a loop")
    with report_errors(loaded.name, kinds=(ValueError,)):
        config.unrolled(num_loops)
    before, config.num_loops = config.num_loops, num_loops
    try:
        yield
    finally:
        config.num_loops = before


# Checkpoints against the model of a run ---------------------------------------------------------


def check_checkpoint(model: nn.Module, checkpoint: Path) -> None:
    """Check that a checkpoint has the tensors and the kind of dynamics of the model of a run.

    Trainer would load the tensors that fit and only warn about the others. Tensors of another kind
    of dynamics may have the same names and shapes, and a run's own settings need not name the kind:
    the default has changed since 0.1.0, where it was `branch` with a controller per token.

    Raises:
        UserError: They differ, or a file is unreadable or claims more memory than its bytes fill.
    """
    check_torch_files(checkpoint)
    with report_errors(f"cannot read checkpoint {checkpoint}"):
        config, saved = read_json_object(checkpoint / "config.json"), tensor_shapes(checkpoint)
        if not saved:
            raise ValueError("it has no safetensors file")
    kinds = [
        f"{name} is {config[name]!r} there and {getattr(model.config, name)!r} here"
        for name in ("dynamics_placement", "dynamics_adaptive")
        if name in config and config[name] != getattr(model.config, name)
    ]
    if kinds:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model: {'; '.join(kinds)}; set them with "
            "--model.NAME VALUE or in the config, or use another --out"
        )
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    known = set(model.state_dict())
    differences = [
        f"{name} is {tuple(saved[name])} there and {tuple(shape)} here"
        for name, shape in expected.items()
        if name in saved and saved[name] != shape
    ]
    differences += [f"{name} is missing" for name in expected if name not in saved]
    differences += [f"{name} is unknown" for name in saved if name not in known]
    if differences:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}; use the config it was trained with, or another --out"
        )


# What a measurement depends on ------------------------------------------------------------------


def weights_hash(model: nn.Module) -> str:
    """A sha256 of every parameter's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that a measurement depends on."""
    result = {"python": platform.python_version()}
    for name in (
        "complexity-lm", "inl-core", "torch", "transformers", "tokenizers", "datasets", "lm_eval",
    ):  # fmt: skip
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result
