"""Parameters of a model: their number, those active per token, and those with weight decay."""

from typing import NamedTuple

import torch
from torch import nn

from complexity_lm.configuration_complexity import DeepConfig
from complexity_lm.modeling_complexity import DeepForCausalLM
from inl_core import dynamics_modules
from inl_core.routing import TokenRoutedMLP


class ParameterCount(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: All parameters; a tied output head counts once.
        active: Those that act on one token: all but the routed experts that its id does not select.
    """

    total: int
    active: int


def count_parameters(config: DeepConfig) -> ParameterCount:
    """Count the parameters of a configuration without allocating them."""
    with torch.device("meta"):
        model = DeepForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        (mlp.num_experts - 1) * (mlp.gate[0].numel() + mlp.up[0].numel() + mlp.down[0].numel())
        for mlp in model.modules()
        if isinstance(mlp, TokenRoutedMLP)
    )
    return ParameterCount(total, total - idle)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """List the parameters that get weight decay: the matrices of the backbone.

    Excluded are vectors (norms, biases) and all parameters of the dynamics: the equilibrium, the
    coefficients and the controller encode the paper's values when they are at rest, and zero would
    mean other values.

    Args:
        model: A model, bare or wrapped (`DeepForCausalLM`, a PEFT model, a sharded one).

    Returns:
        Names as in ``model.named_parameters()``, for `Trainer.get_decay_parameter_names`.
    """
    dynamics = {
        id(parameter)
        for module in dynamics_modules(model).values()
        for parameter in module.parameters()
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in dynamics
    ]
