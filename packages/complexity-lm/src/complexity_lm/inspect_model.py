"""`complexity-lm inspect`: the contents of a model folder or checkpoint."""

from dataclasses import asdict
from typing import Any

from complexity_lm.configuration_complexity import DeepConfig
from complexity_lm.loading import load, weights_hash
from complexity_lm.parameters import count_parameters
from complexity_lm.tokenizer import vocabulary_size
from inl_core import LoopedDynamics, certify, dynamics_modules

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts",
)  # fmt: skip


def inspect(name: str) -> dict[str, Any]:
    """Load a model and describe it, without running it on text.

    Args:
        name: A model folder, a run's folder, a checkpoint or a Hub id.

    Returns:
        Sizes, parameters, dynamics, tokenizer and training text.

    Raises:
        UserError: It cannot be loaded.
    """
    loaded = load(name, device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    config = model.config
    parameters = {"total": sum(parameter.numel() for parameter in model.parameters())}
    if isinstance(config, DeepConfig):
        parameters["active"] = count_parameters(config).active
    dynamics = {
        name: module
        for name, module in dynamics_modules(model).items()
        if not isinstance(module, LoopedDynamics)
    }
    loop = ("num_loops", "loop_start", "loop_end", "loop_dynamics")
    return {
        "model": type(model).__name__,
        "parameters": parameters,
        "context": loaded.context,
        "sizes": {key: getattr(config, key) for key in _SIZES if hasattr(config, key)},
        **(
            {"loop": {key: getattr(config, key) for key in loop}}
            if getattr(config, "loop_start", None) is not None
            else {}
        ),
        "dynamics": {
            key: value for key, value in config.to_dict().items() if key.startswith("dynamics_")
        },
        "equilibria": {
            layer: {
                key: value
                for key, value in module.get_dynamics_stats().items()
                if key.startswith("mu_")
            }
            for layer, module in dynamics.items()
        },
        # The part of the certificate that depends on the parameters alone.
        **({"certificate": certify(model).summary()} if dynamics else {}),
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "ids": vocabulary_size(tokenizer),
            "eos": tokenizer.eos_token,
            "pad": tokenizer.pad_token,
        },
        "trained_on": asdict(loaded.data) if loaded.data else None,
        "weights_sha256": weights_hash(model),
    }
