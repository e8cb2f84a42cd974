"""`complexity-lm inspect`: what a model folder or checkpoint holds, without running it on text."""

from dataclasses import asdict
from typing import Any

from torch import nn

from complexity_lm.loading import Loaded, load, weights_hash
from inl_core import certify, dynamics_modules


def inspect(name: str) -> dict[str, Any]:
    """Open a model and describe it.

    Args:
        name: A model folder, a run's folder, a checkpoint or a hub id.

    Returns:
        Sizes, parameters, dynamics, tokenizer and training text.

    Raises:
        UserError: It cannot be loaded.
    """
    loaded = load(name, device="cpu")
    config = loaded.model.config
    return {
        "model": type(loaded.model).__name__,
        "parameters": _parameters(loaded),
        "context": loaded.context,
        "sizes": {
            key: getattr(config, key)
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "num_experts",
            )
            if hasattr(config, key)
        },
        "dynamics": {
            key: value for key, value in config.to_dict().items() if key.startswith("dynamics_")
        },
        "equilibria": {
            layer: {
                key: value
                for key, value in module.get_dynamics_stats().items()
                if key.startswith("mu_")
            }
            for layer, module in dynamics_modules(loaded.model).items()
        },
        **_certificate(loaded.model),
        "tokenizer": {
            "class": type(loaded.tokenizer).__name__,
            "ids": len(loaded.tokenizer),
            "eos": loaded.tokenizer.eos_token,
            "pad": loaded.tokenizer.pad_token,
        },
        "trained_on": asdict(loaded.data) if loaded.data else None,
        "weights_sha256": weights_hash(loaded.model),
    }  # fmt: skip


def _certificate(model: nn.Module) -> dict[str, Any]:
    """The figures of `inl_core.certify` that need no text: of the parameters alone."""
    if not dynamics_modules(model):
        return {}
    return {"certificate": certify(model).summary()}


def _parameters(loaded: Loaded) -> dict[str, int]:
    from complexity_lm import DeepConfig, count_parameters

    found = {"total": sum(parameter.numel() for parameter in loaded.model.parameters())}
    if isinstance(loaded.model.config, DeepConfig):
        found["active"] = count_parameters(loaded.model.config).active
    return found
