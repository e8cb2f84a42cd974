"""Stock diffusers schedulers by name, with the settings that fit a model's objective.

A model trained by flow matching defines an ordinary differential equation dx/dt = v(x, t) from
noise at t = 1 to an image at t = 0. Several diffusers schedulers solve it under differently named
settings; here each gets those that mean the same equation. Models of the DDPM objectives take those
schedulers that reach the distribution of the data when the network is exact.
"""

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, SchedulerMixin
from torch import Tensor

from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
from inl_core.run.errors import UserError

_SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": ("shift", {}),
    "FlowMatchHeunDiscreteScheduler": ("shift", {}),
    "DPMSolverMultistepScheduler": ("flow_shift", _SOLVER),
    "DPMSolverSinglestepScheduler": (
        "flow_shift",
        _SOLVER | {"final_sigmas_type": "zero", "lower_order_final": True},
    ),
    "UniPCMultistepScheduler": ("flow_shift", _SOLVER),
}
"""Class name: (its name for the time shift, settings that make it integrate a flow). Left out are
DEIS, whose last flow step does not reduce the noise level, and stochastic and distilled ones."""


_DETERMINISTIC = (
    "DDIMScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
_STOCHASTIC = (
    "DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "SASolverScheduler",
)  # fmt: skip
_NOT_FOR_SAMPLE = {
    "PNDMScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
}  # fmt: skip
"""Those that diffusers has not written for networks that predict the clean image."""

# What a network was trained for, and the value of classes that have no such setting.
_FACTS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": None, "beta_end": None, "beta_schedule": None,
    "trained_betas": None, "prediction_type": None, "rescale_betas_zero_snr": False,
}  # fmt: skip
# Choices of the sampler: kept where they were asked for, else those of the model's own scheduler.
_INHERITED = (
    "timestep_spacing", "clip_sample", "clip_sample_range", "thresholding",
    "dynamic_thresholding_ratio", "sample_max_value",
)  # fmt: skip
_OPTIONS = frozenset({
    "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final",
    "disable_corrector", "timestep_spacing", "steps_offset", "predictor_order", "corrector_order",
})  # fmt: skip
_DDPM_OPTIONS = _OPTIONS | set(_INHERITED) | {
    "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "final_sigmas_type",
    "skip_prk_steps", "set_alpha_to_one", "variance_type", "lambda_min_clipped",
}  # fmt: skip
_SIGMA_OPTIONS = frozenset({"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"})


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler integrates a flow-matching model."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(
        getattr(scheduler.config, "use_flow_sigmas", False)
    )


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What a model that a scheduler fits predicts: flow, epsilon, v_prediction or sample."""
    return "flow" if is_flow(scheduler) else scheduler.config.prediction_type


def objective_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What the model that a scheduler fits was trained for, as settings that are plain data.

    For a flow the shift of its times, else the schedule of its noise and how it is sampled.
    """
    config = scheduler.config
    steps = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if is_flow(scheduler):
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        return {"prediction_type": "flow", "num_train_timesteps": steps, "shift": shift}
    if "prediction_type" not in config:
        raise UserError(
            f"{type(scheduler).__name__} does not say what the model predicts: give the pipeline "
            f"one of {', '.join([*FLOW_SCHEDULERS, *_DETERMINISTIC])}"
        )
    return {k: _plain(config[k]) for k in (*_FACTS, *_INHERITED) if k in config}


def scheduler_names(predicts: str, deterministic: bool = False) -> list[str]:
    """Names of the diffusers schedulers that sample from a model which predicts that."""
    if predicts == "flow":
        return list(FLOW_SCHEDULERS)
    names = _DETERMINISTIC if deterministic else _DETERMINISTIC + _STOCHASTIC
    return [n for n in names if predicts != "sample" or n not in _NOT_FOR_SAMPLE]


def fit_scheduler(scheduler: SchedulerMixin, objective: Mapping[str, Any]) -> SchedulerMixin:
    """Give a scheduler the settings that a model needs; its own are kept where they may differ.

    `X.from_config(pipe.scheduler.config)` passes on only what the two classes name alike, and of
    that only what the first was given explicitly: a flow becomes noise prediction, and Heun's
    scheduler gets its own noise levels.

    Args:
        scheduler: A scheduler of diffusers, or of a class of your own, which is taken as it is.
        objective: As `objective_of` returns it.

    Returns:
        Another scheduler of its class, or `scheduler` itself if the class is your own.

    Raises:
        UserError: If its class cannot sample from the model, or a setting that was given explicitly
            contradicts the objective or is not supported.
    """
    cls, predicts = type(scheduler), objective["prediction_type"]
    name = cls.__name__
    names = scheduler_names(predicts)
    if not cls.__module__.startswith("diffusers."):
        if prediction_type(scheduler) != predicts:
            raise UserError(
                f"{name} is for a model that predicts {prediction_type(scheduler)}, and this one "
                f"predicts {predicts}: take one of {', '.join(names)}"
            )
        return scheduler
    if name not in names:
        raise UserError(_unknown(name, names, predicts))
    parameters = inspect.signature(cls.__init__).parameters
    config, defaults = scheduler.config, scheduler.config.get("_use_default_values", ())
    asked = {k: config[k] for k in parameters if k in config and k not in defaults}
    if predicts == "flow":
        shift, facts = FLOW_SCHEDULERS[name]
        facts = facts | {"num_train_timesteps": objective["num_train_timesteps"]}
        settings = {shift: objective["shift"]}
        options = _OPTIONS | {shift} | (_SIGMA_OPTIONS if shift == "shift" else set())
    else:
        facts = {k: objective.get(k, without) for k, without in _FACTS.items() if k in objective}
        for key, without in _FACTS.items():
            if key not in parameters and facts.pop(key, without) != without:
                raise UserError(f"{name} has no {key}, which this model was trained with")
        settings = {k: objective[k] for k in _INHERITED if k in parameters and k in objective}
        options = _DDPM_OPTIONS
    for key, value in asked.items():
        if key in options and key not in facts:
            settings[key] = value
        elif _plain(value) not in (facts.get(key, parameters[key].default), objective.get(key)):
            expected = facts.get(key, parameters[key].default)
            raise UserError(
                f"{name} with {key}={value!r} does not sample from this model, which predicts "
                f"{predicts}: leave {key} at {expected!r}"
            )
    return cls(**(settings | facts))


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def named_scheduler(
    current: SchedulerMixin, name: str | None = None, shift: float | None = None
) -> SchedulerMixin:
    """Build another scheduler for the model that `current` samples from.

    `name` is a class in diffusers that fits the objective, and `shift` the time shift of a flow
    scheduler: above 1 takes smaller steps at high noise. None keeps that of `current`.
    """
    if name is None and shift is None:
        return current
    name, objective = name or type(current).__name__, objective_of(current)
    predicts = objective["prediction_type"]
    if shift is not None:
        if predicts != "flow":
            raise UserError(
                f"shift {shift} is for flow matching; this model samples with "
                f"{type(current).__name__}, which has none"
            )
        if shift <= 0:
            raise UserError(f"shift {shift} must be above 0; 1 is off")
        objective["shift"] = shift
    names = scheduler_names(predicts)
    if name not in names:
        raise UserError(_unknown(name, names, predicts))
    cls = getattr(diffusers, name)
    # The options of a flow's solver mean other things in another solver.
    return fit_scheduler(
        cls() if predicts == "flow" else cls.from_config(current.config), objective
    )


def _unknown(name: str, names: list[str], predicts: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    objective = "flow matching" if predicts == "flow" else predicts
    return (
        f"no scheduler {name!r} for a model trained on {objective}; "
        f"{'near names are' if near is not names else 'there are'} {', '.join(near)}"
    )


def set_steps(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device) -> Tensor:
    """Set the steps of a scheduler and return its timesteps, one per evaluation of the network.

    Some flow schedulers would end with a step at the least noise level of training, which changes
    nothing. They get levels 1, (n-1)/n, ..., 1/n (then shifted), and the last step ends at 0.
    """
    n = num_inference_steps
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        scheduler.sigma_min = 1.0 / n
        scheduler.set_timesteps(n, device=device)
    elif (
        hasattr(scheduler.config, "shift")
        and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    ):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / n, n).tolist(), device=device)
    else:
        scheduler.set_timesteps(n, device=device)
    # A scheduler would otherwise search its first timestep by value. Many steps round to the same
    # one, and Heun's has each twice.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler.timesteps


def network_times(scheduler: SchedulerMixin) -> Tensor:
    """The times passed to the network, in [0, 1000], one per timestep of the scheduler.

    Multistep solvers round their timesteps to integers but integrate between exact noise levels; at
    low noise that is an error of some percent in the velocity. A flow network gets exact levels.
    """
    if not is_flow(scheduler) or scheduler.timesteps.is_floating_point():
        return scheduler.timesteps
    levels = scheduler.sigmas[: len(scheduler.timesteps)].to(scheduler.timesteps.device)
    return levels * scheduler.config.num_train_timesteps


def noised(scheduler: SchedulerMixin, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """Add unit noise to clean images, to the level at which a step of a set scheduler starts.

    `step` is from 0 to the number of timesteps, after which images are clean.
    """
    if step == len(scheduler.timesteps):
        return clean
    if is_flow(scheduler):
        level = (network_times(scheduler)[step] / scheduler.config.num_train_timesteps).to(clean)
        return (1 - level) * clean + level * noise
    return scheduler.add_noise(clean, noise, scheduler.timesteps[step : step + 1])


def predicted_clean(
    scheduler: SchedulerMixin, x: Tensor, prediction: Tensor, time: Tensor
) -> Tensor:
    """The clean image that a prediction of the network means.

    Args:
        scheduler: Of the model; what it predicts and its noise levels.
        x: Input of the network, as scaled for it.
        prediction: Its output, guided or not.
        time: Network time in [0, 1000].
    """
    level = float(time)
    if is_flow(scheduler):
        return x - level / scheduler.config.num_train_timesteps * prediction
    last = len(scheduler.alphas_cumprod) - 1
    kept = float(scheduler.alphas_cumprod[min(round(level), last)])
    signal, noise = kept**0.5, (1 - kept) ** 0.5
    return {
        "epsilon": (x - noise * prediction) / signal,
        "v_prediction": signal * x - noise * prediction,
        "sample": prediction,
    }[prediction_type(scheduler)]


def begin_at(scheduler: SchedulerMixin, num_inference_steps: int, strength: float) -> int:
    """Skip the first steps of a set scheduler, so that a share `strength` is run.

    Returned is the number of the first timestep; one is left at least if `strength` is above 0.
    """
    # The small number compensates for rounding: 0.07 * 100 is 7.000000000000001.
    run = min(math.ceil(num_inference_steps * strength - 1e-6), num_inference_steps)
    first = min((num_inference_steps - run) * scheduler.order, len(scheduler.timesteps))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return first


def is_guided(time: Tensor, guidance_scale: float, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at a network time in [0, 1000]; the interval is closed, in [0, 1]."""
    level = float(time) / NUM_TRAIN_TIMESTEPS
    return guidance_scale != 1 and interval[0] <= level <= interval[1]


def count_evaluations(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> int:
    """Number of network evaluations per image.

    A step takes one evaluation (Heun's two, except the last), and twice as many where guidance
    acts: for the null row or for the guide.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    set_steps(fresh, num_inference_steps, torch.device("cpu"))
    return sum(
        1 + is_guided(time, guidance_scale, guidance_interval) for time in network_times(fresh)
    )
