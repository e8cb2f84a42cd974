"""Stock diffusers schedulers by name, with the settings that fit a model's objective.

A model trained by flow matching defines an ordinary differential equation dx/dt = v(x, t) from
noise at t = 1 to an image at t = 0. Several diffusers schedulers solve it under differently named
settings; here each gets those that mean the same equation. Models of the DDPM objectives take any
scheduler that diffusers lists as compatible with theirs.
"""

import difflib
import inspect
import math
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


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler integrates a flow-matching model."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(
        getattr(scheduler.config, "use_flow_sigmas", False)
    )


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What a model that a scheduler fits predicts: flow, epsilon, v_prediction or sample."""
    return "flow" if is_flow(scheduler) else scheduler.config.prediction_type


def named_scheduler(
    current: SchedulerMixin, name: str | None = None, shift: float | None = None
) -> SchedulerMixin:
    """Build another scheduler for the model that `current` samples from.

    `name` is a class in diffusers that fits the objective, and `shift` the time shift of a flow
    scheduler: above 1 takes smaller steps at high noise. None keeps that of `current`.
    """
    if name is None and shift is None:
        return current
    name = name or type(current).__name__
    if is_flow(current):
        if name not in FLOW_SCHEDULERS:
            raise UserError(_unknown(name, list(FLOW_SCHEDULERS), "flow matching"))
        own: float = current.config.get("flow_shift") or current.config.get("shift") or 1.0
        shift = own if shift is None else shift
        if shift <= 0:
            raise UserError(f"shift {shift} must be above 0; 1 is off")
        shift_name, settings = FLOW_SCHEDULERS[name]
        steps = current.config.num_train_timesteps
        arguments = settings | {shift_name: shift, "num_train_timesteps": steps}
        return getattr(diffusers, name)(**arguments)
    if shift is not None:
        raise UserError(
            f"shift {shift} is for flow matching; this model samples with "
            f"{type(current).__name__}, which has none"
        )
    compatible = {cls.__name__: cls for cls in current.compatibles}
    if name not in compatible:
        raise UserError(_unknown(name, sorted(compatible), current.config.prediction_type))
    return compatible[name].from_config(current.config)


def _unknown(name: str, names: list[str], objective: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
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


def begin_at(scheduler: SchedulerMixin, num_inference_steps: int, strength: float) -> int:
    """Skip the first steps of a set scheduler, so that a share `strength` is run.

    Returned is the number of the first timestep; one is left at least if `strength` is above 0.
    """
    # The small number compensates for rounding: 0.07 * 100 is 7.000000000000001.
    run = min(math.ceil(num_inference_steps * strength - 1e-6), num_inference_steps)
    first = min((num_inference_steps - run) * scheduler.order, len(scheduler.timesteps))
    # A scheduler would otherwise search its first timestep by value, and Heun's has each one twice.
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
