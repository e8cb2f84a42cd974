"""From a config and its data to the network and its training state."""

from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from complexity_dit.config import ModelConfig, TrainConfig
from complexity_dit.latents import TrainingData
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel, middle_blocks
from complexity_dit.objective import time_quantiles
from complexity_dit.optim import build_optimizer
from complexity_dit.spikes import build_guard
from complexity_dit.state import TrainState
from inl_core.run.errors import UserError


def build_model(config: TrainConfig, data: TrainingData) -> ComplexityDiTTransformer2DModel:
    """The network of a config, with one label table for each field of the data."""
    config.objective.check()
    settings = {
        "sample_size": data.sample_size,
        "patch_size": config.model.patch_size,
        "in_channels": data.channels,
        "label_fields": list(data.label_names),
        "num_classes": [len(names) for names in data.label_names.values()],
        "dynamics_placement": config.model.dynamics_placement,
        "dynamics_adaptive": config.model.dynamics_adaptive,
        "network_output": "sample" if config.objective.writes_sample else "target",
        "token_drop_start": config.model.token_drop_start,
        "token_drop_end": config.model.token_drop_end,
        "value_residual": config.model.value_residual,
        "routing": config.model.routing,
        "num_experts": config.model.num_experts,
    }
    if config.model.routing == "timestep" and config.model.num_experts > 1:
        settings["routing_edges"] = time_quantiles(config.model.num_experts, config.objective)
    try:
        model = ComplexityDiTTransformer2DModel.from_size(
            config.model.size, **(settings | config.model.overrides)
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"this model cannot be built: {error}") from error
    _check_token_drop(config.model, model)
    return model


def _check_token_drop(config: ModelConfig, model: ComplexityDiTTransformer2DModel) -> None:
    rate = config.token_drop_rate
    if not 0 < config.token_drop_until <= 1:
        raise UserError(
            f"token_drop_until {config.token_drop_until} must be above 0 and at most 1: the share "
            "of the run with dropping (token_drop_rate 0 switches it off)"
        )
    if not 0 <= rate < 1:
        raise UserError(f"token_drop_rate {rate} must be at least 0 (off) and below 1")
    start, end = middle_blocks(model.config)
    if rate and start >= end:
        raise UserError(
            f"token_drop_rate {rate}: a network of {model.config.num_layers} blocks has no middle "
            "ones to bypass; use 3 or more, or set token_drop_start and token_drop_end"
        )


def build_state(model: ComplexityDiTTransformer2DModel, config: TrainConfig) -> TrainState:
    """Optimizer, schedule, EMA and spike guard round a model."""
    optim = config.optim
    optimizer = build_optimizer(model, optim)
    lr_scheduler = get_scheduler(
        optim.schedule,
        optimizer,
        num_warmup_steps=optim.warmup_steps,
        num_training_steps=config.steps,
    )
    ema = EMAModel(
        [p for p in model.parameters() if p.requires_grad],
        decay=config.ema.decay,
        use_ema_warmup=True,
        power=config.ema.power,
        foreach=True,
    )
    guard = build_guard(optim, config.mixed_precision)
    return TrainState(model, ema, optimizer, lr_scheduler, guard)


def prepared_state(
    network: ComplexityDiTTransformer2DModel, config: TrainConfig, accelerator: Accelerator
) -> tuple[TrainState, nn.Module]:
    """`build_state` on the run's device and processes, and the model to call in a step.

    The order matters: blocks are compiled before sharding hooks into them, and the average is laid
    beside the parameters as they are after that.
    """
    state = build_state(network, config)
    if config.compile == "regional":
        network.compile_repeated_blocks(fullgraph=True)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    state.average_from_here()
    return state, model
