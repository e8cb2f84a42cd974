"""What the network is asked to predict: pure functions from (image, noise, time) to a target.

Flow matching (Lipman et al., arXiv 2210.02747; rectified flow, Liu et al., arXiv 2209.03003) with
logit-normal times (Esser et al., arXiv 2403.03206) is the default; epsilon and v prediction on the
linear DDPM schedule are there for comparison with DiT.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

from inl_core.run.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000

MIN_NOISE = 0.02
"""Least noise level at which a network that writes the clean image is trained and believed: its
velocity is divided by the level, and so are its errors."""


@dataclass
class ObjectiveConfig:
    """The training target and the distribution of noise levels."""

    prediction_type: Literal["flow", "epsilon", "v_prediction"] = "flow"
    """flow: velocity of the straight path from image to noise; the others use the DDPM schedule."""

    network_output: Literal["sample", "target"] | None = None
    """What the network writes: the clean image (`sample`, flow only), from which the velocity
    follows, or the target itself; the loss is on the target either way. By default sample for
    flow, target for the others."""

    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the noise level t in (0, 1)."""

    logit_mean: float = 0.0
    """Mean of logit(t) for logit_normal; above 0 favours high noise."""

    logit_std: float = 1.0
    """Standard deviation of logit(t) for logit_normal."""

    shift: float = 2.0
    """Time shift s in training: t becomes s*t / (1 + (s - 1)*t); above 1 puts more of it on high
    noise, where composition is decided. 1 is off."""

    sampling_shift: float = 5.0
    """Time shift in sampling (flow only). Above the training's: the last step, to the clean image,
    then starts from more noise, whose traces a small network cannot remove in smaller steps."""

    label_dropout: float | dict[str, float] = 0.1
    """Probability that each label of an image is replaced by the null row, for guidance; or one
    for each label field, e.g. {style: 0.1, artist: 0.5}, every field named."""

    direction_weight: float = 0.0
    """Weight of the velocity-direction term 1 - cosine(prediction, target), added to the squared
    error (FasterDiT, arXiv 2410.10356); flow and v_prediction only. 0 is off."""

    direction_over: Literal["image", "channels"] = "image"
    """What a direction is: image, one for all numbers of an image; or channels, one at each
    position over its channels, which asks for many channels (latents)."""

    @property
    def writes_sample(self) -> bool:
        """Whether the network writes the clean image.

        Raises:
            UserError: If it should, and the objective has no velocity that follows from it.
        """
        if self.network_output == "sample" and self.prediction_type != "flow":
            raise UserError(
                f"network_output sample goes with prediction_type flow, not "
                f"{self.prediction_type}: use --objective.network_output target"
            )
        return self.prediction_type == "flow" and self.network_output != "target"

    def check(self) -> None:
        """Refuse settings that do not fit each other.

        Raises:
            UserError: If a weight or a probability is out of range, or the direction term is asked
                for where the target is no velocity.
        """
        _ = self.writes_sample
        if not (math.isfinite(self.direction_weight) and self.direction_weight >= 0):
            raise UserError(
                f"direction_weight {self.direction_weight} must be 0 (off) or a positive number"
            )
        if self.direction_weight and self.prediction_type == "epsilon":
            raise UserError(
                f"direction_weight {self.direction_weight} needs a velocity as the target: use "
                "prediction_type flow or v_prediction, or direction_weight 0 with epsilon"
            )
        dropout = self.label_dropout
        for field, value in dropout.items() if isinstance(dropout, dict) else [("", dropout)]:
            if not 0 <= value <= 1:
                name = f"label_dropout of {field}" if field else "label_dropout"
                raise UserError(f"{name}: {value} must be a probability, from 0 to 1")

    def label_dropouts(self, fields: Sequence[str]) -> list[float]:
        """The dropout probability of each label field, in their order.

        Raises:
            UserError: If `label_dropout` names a field that is not there, or leaves one out.
        """
        if not isinstance(self.label_dropout, dict):
            return [self.label_dropout] * len(fields)
        if set(self.label_dropout) != set(fields):
            raise UserError(
                f"label_dropout names {', '.join(self.label_dropout) or 'no field'}, but the label "
                f"fields of the data are {', '.join(fields) or 'none'}: give each of them a "
                "probability (0 for never), or one number for all"
            )
        return [self.label_dropout[field] for field in fields]


def sample_times(count: int, config: ObjectiveConfig, generator: torch.Generator) -> Tensor:
    """Noise levels t in (0, 1), shape (count,), fp32: 0 is the clean image, 1 is pure noise."""
    if config.time_sampling == "logit_normal":
        normal = torch.randn(count, generator=generator)
        times = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    else:
        times = torch.rand(count, generator=generator)
    times = config.shift * times / (1 + (config.shift - 1) * times)
    return times.clamp(min=MIN_NOISE) if config.writes_sample else times


def time_quantiles(count: int, config: ObjectiveConfig) -> list[float]:
    """The count - 1 noise levels that cut the distribution of `sample_times` into equal parts."""
    times = torch.arange(1, count, dtype=torch.float64) / count
    if config.time_sampling == "logit_normal":
        times = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(times))
    return (config.shift * times / (1 + (config.shift - 1) * times)).tolist()


def velocity_towards(clean: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """The flow velocity that leads from a noisy image straight to a clean one.

    x_t = (1 - t) x + t eps gives dx_t/dt = eps - x = (x_t - x) / t (Li & He, arXiv 2511.13720).

    Args:
        clean: The network's idea of the clean image, (B, C, Y, X).
        noisy: Its input x_t, likewise.
        timestep: 1000 times t, (B,); t is taken as at least `MIN_NOISE`.
    """
    t = (timestep / NUM_TRAIN_TIMESTEPS).clamp(min=MIN_NOISE).view(-1, 1, 1, 1)
    return (noisy - clean) / t.to(clean)


def noisy_input_and_target(
    clean: Tensor, noise: Tensor, times: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The network's input, its timestep, and what it should predict.

    Args:
        clean: Images or latents, (B, C, Y, X).
        noise: Standard normal noise of the same shape.
        times: Noise levels in (0, 1), (B,).
        config: The objective.

    Returns:
        Noisy input (B, C, Y, X); timestep in [0, 1000], (B,) as diffusers' schedulers count it;
        target (B, C, Y, X).
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
    """Replace each label, independently, by -1 (the null row) with the probability of its field.

    Fields are dropped one by one rather than together, so that guidance works from any subset of
    labels, and a painting with a style but no genre is an input that the network has seen.

    Args:
        labels: Label ids, (B, F).
        probabilities: One for each field, F of them.
        generator: Where the randomness comes from.
    """
    dropped = torch.rand(labels.shape, generator=generator) < torch.tensor(probabilities)
    return torch.where(dropped, -1, labels)


def training_loss(prediction: Tensor, target: Tensor, config: ObjectiveConfig) -> Tensor:
    """Mean squared error, plus `direction_weight` times the mean of 1 - cosine.

    The squared error of a velocity is dominated by its length; the second term asks for its
    direction alone (FasterDiT, Yao et al., arXiv 2410.10356; LightningDiT, arXiv 2501.01423, takes
    the cosine over the channels of each position).

    Args:
        prediction: What the network says, (B, C, Y, X); taken in the dtype of the target.
        target: What it should say, likewise.
        config: The objective.

    Returns:
        A scalar in that dtype.
    """
    prediction = prediction.to(target.dtype)
    loss = F.mse_loss(prediction, target)
    if config.direction_weight:
        over_image = config.direction_over == "image"
        pair = [x.flatten(1) if over_image else x for x in (prediction, target)]
        loss = loss + config.direction_weight * (1 - F.cosine_similarity(*pair, dim=1)).mean()
    return loss


def build_scheduler(config: ObjectiveConfig) -> SchedulerMixin:
    """The stock diffusers scheduler that samples from a model trained on this objective."""
    if config.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=config.sampling_shift)
    return DDIMScheduler(
        NUM_TRAIN_TIMESTEPS,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",  # starts at the noisiest step (Lin et al., arXiv 2305.08891)
    )
