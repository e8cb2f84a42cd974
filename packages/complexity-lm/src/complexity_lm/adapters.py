"""LoRA adapters of a text model: added to train, filled from a folder to resume or to use.

An adapter folder has `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from complexity_lm.config import LoraOptions
from inl_core.run.adapters import checked_settings
from inl_core.run.errors import UserError
from inl_core.run.json_files import read_json_object

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
"""In an adapter folder: PEFT's settings and the name of the model that it belongs to."""

_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter and no model."""
    return (folder / ADAPTER_FILE).exists() and not (folder / "config.json").exists()


def add_adapter(model: PreTrainedModel, base: str, options: LoraOptions, seed: int) -> None:
    """Freeze a model and add a new adapter; `base` is the name of the model in its folder.

    Raises:
        UserError: The extra is not installed, or no layer has one of the names.
    """
    _check_peft()
    from peft import LoraConfig

    torch.manual_seed(seed)
    model.requires_grad_(False)
    model.name_or_path = base
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(settings)
    except ValueError as error:  # no layer has such a name
        raise UserError(f"lora.targets {options.targets}: {error}") from error
    logger.info(
        "an adapter of rank %d for %s: %d trainable parameters",
        options.rank,
        " ".join(options.targets),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def base_of(folder: Path) -> str:
    """The model that an adapter folder names as its base.

    Raises:
        UserError: It names none.
    """
    name = read_json_object(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{folder / ADAPTER_FILE} names no base model (base_model_name_or_path)")
    return name


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapter of a folder, which may be of anyone, to its base.

    Raises:
        UserError: It is of another kind than LoRA, or was trained on another model.
    """
    _check_peft()
    from peft import LoraConfig

    settings = read_json_object(folder / ADAPTER_FILE)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"the adapter is of the kind {settings.get('peft_type')!r}; LoRA alone is loaded here: "
            "merge it into the model with peft's merge_and_unload and save that"
        )
    model.add_adapter(LoraConfig(**checked_settings(settings, _tensors(folder), model) or {}))
    fill_adapter(model, folder)
    model.requires_grad_(False)


def fill_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give the adapter of a model the weights of a folder.

    Raises:
        UserError: Their names or shapes are others.
    """
    from peft import set_peft_model_state_dict

    saved = _tensors(folder)
    own: dict[str, Tensor] = model.get_adapter_state_dict()
    differences = [f"{name} is missing" for name in own if name not in saved]
    differences += [f"{name} is unknown" for name in saved if name not in own]
    differences += [
        f"{name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here"
        for name, tensor in saved.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if differences:
        raise UserError(
            f"{folder} has the adapter of another model ({len(differences)} tensors differ): "
            f"{'; '.join(differences[:3])}"
        )
    set_peft_model_state_dict(model, saved)


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Any] = load_file(folder / _WEIGHTS)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise UserError("adapters need PEFT: pip install 'complexity-lm[lora]'")
