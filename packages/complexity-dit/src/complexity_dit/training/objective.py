"""Training targets: pure functions of (image, noise, time), their loss and their scheduler.

Flow matching (Lipman et al., arXiv 2210.02747; rectified flow, Liu et al., arXiv 2209.03003) with
logit-normal times (Esser et al., arXiv 2403.03206) is the default; epsilon and v prediction on the
linear DDPM schedule, with uniform steps (Ho et al., arXiv 2006.11239), allow a comparison with DiT.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from complexity_dit.config import ObjectiveConfig
from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
from complexity_dit.models.transformer import MIN_NOISE


def sample_times(count: int, config: ObjectiveConfig, generator: torch.Generator) -> Tensor:
    """Noise levels t in (0, 1), shape (count,), fp32: 0 is the clean image, 1 is pure noise."""
    config = config.resolved()
    if config.time_sampling == "logit_normal":
        normal = torch.randn(count, generator=generator)
        times = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    else:
        times = torch.rand(count, generator=generator)
    assert config.shift is not None  # it is resolved
    times = config.shift * times / (1 + (config.shift - 1) * times)
    return times.clamp(min=MIN_NOISE) if config.writes_sample else times


def noisy_input_and_target(
    clean: Tensor, noise: Tensor, times: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The input, the timestep and the target of the network.

    From clean images or latents (B, C, Y, X), unit noise of that shape and noise levels in (0, 1),
    (B,); the timestep is in [0, 1000] as in diffusers' schedulers.
    """
    if config.prediction_type == "flow":
        # x_t = (1 - t) x + t eps, so dx_t/dt = eps - x; diffusers' flow schedulers call t sigma.
        t = times.view(-1, 1, 1, 1).to(clean)
        return (1 - t) * clean + t * noise, times * NUM_TRAIN_TIMESTEPS, noise - clean
    schedule = _ddpm_schedule()
    steps = (times * NUM_TRAIN_TIMESTEPS).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)
    noisy = schedule.add_noise(clean, noise, steps)
    if config.prediction_type == "epsilon":
        return noisy, steps, noise
    return noisy, steps, schedule.get_velocity(clean, noise, steps)


@lru_cache(maxsize=1)
def _ddpm_schedule() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)


def drop_labels(
    labels: Tensor, probabilities: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Replace each label independently by -1 (the null row), with the probability of its field.

    Fields are dropped one by one rather than together, so that guidance works from any subset of
    labels, and the network is trained on paintings with, for instance, a style but no genre.
    """
    dropped = torch.rand(labels.shape, generator=generator) < torch.tensor(probabilities)
    return torch.where(dropped, -1, labels)


def training_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, in the dtype of the target."""
    return F.mse_loss(prediction.to(target.dtype), target)


def build_scheduler(config: ObjectiveConfig) -> SchedulerMixin:
    """The scheduler of diffusers that samples from a model trained on this objective."""
    if config.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=config.sampling_shift)
    return DDIMScheduler(
        NUM_TRAIN_TIMESTEPS,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",  # starts at the noisiest step (Lin et al., arXiv 2305.08891)
    )
