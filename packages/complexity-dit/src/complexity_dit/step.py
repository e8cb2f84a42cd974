"""One optimizer step: forward and backward in parts, clip, update, average."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from complexity_dit.config import TrainConfig
from complexity_dit.noise_levels import NoiseLevels
from complexity_dit.objective import training_loss
from complexity_dit.sharding import whole
from complexity_dit.state import TrainState


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainState,
    batch: dict[str, Tensor],
    config: TrainConfig,
    noise: NoiseLevels,
) -> tuple[Tensor, Tensor, bool]:
    """One update of weights, schedule and EMA; of the schedule alone where the guard says no.

    Returns:
        Loss and gradient norm, still on device, and whether the step was taken.
    """
    batch = {
        name: value.to(accelerator.device, non_blocking=value.is_pinned())
        for name, value in batch.items()
    }
    parts = config.gradient_accumulation_steps
    chunks = {name: value.chunk(parts) for name, value in batch.items()}
    total = torch.zeros((), device=accelerator.device)
    for i in range(parts):
        part = {name: values[i] for name, values in chunks.items()}
        with accelerator.no_sync(model) if i + 1 < parts else nullcontext():
            with accelerator.autocast():  # DDP has its own; FSDP2 has none
                prediction = model(
                    part["x"],
                    part["timestep"],
                    part["labels"],
                    kept_tokens=part.get("kept_tokens"),
                    return_dict=False,
                )[0]
            loss = training_loss(prediction, part["target"], config.objective) / parts
            accelerator.backward(loss)
        noise.add(part["timestep"], prediction.detach(), part["target"])
        total += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    assert grad_norm is not None  # accelerate gives none on XLA only
    grad_norm = whole(grad_norm)
    taken = state.guard is None or state.guard.admits(float(grad_norm))
    if taken:
        state.optimizer.step()
        state.ema.step(state.trained())
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    return total, grad_norm, taken
