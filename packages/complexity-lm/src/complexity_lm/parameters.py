"""Parameters of a model: their number, those active per token, those with weight decay, FLOPs."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

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


def flops_per_token(model: PreTrainedModel, context: int) -> int:
    """Floating-point operations of training on one token of a block, in both passes.

    As the PaLM paper counts them (arXiv 2204.02311, appendix B): two for each weight of a product
    that acts on the token and two for each of its gradients, of which frozen weights have one; and
    12 x layers x width x context of attention, which is counted as if it looked at all of a block.
    The layers of a loop count `num_loops` times.
    """
    config = model.config
    layers, times = config.num_hidden_layers, {}
    if getattr(config, "loop_start", None) is not None:
        layers = config.unrolled().num_hidden_layers
        stack: Any = model.base_model.layers
        core = stack[config.loop_start : config.loop_end]
        times = {id(weight): config.num_loops for weight in core.parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    experts = {
        id(weight): mlp.num_experts
        for mlp in model.modules()
        if isinstance(mlp, TokenRoutedMLP)
        for weight in (mlp.gate, mlp.up, mlp.down)
    }
    count = 0
    for weight in model.parameters():
        looked_up = weight is embedding and (head is None or head.weight is not embedding)
        if weight.ndim > 1 and not looked_up:
            active = weight.numel() // experts.get(id(weight), 1)
            count += (6 if weight.requires_grad else 4) * active * times.get(id(weight), 1)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return count + 12 * layers * width * context


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
