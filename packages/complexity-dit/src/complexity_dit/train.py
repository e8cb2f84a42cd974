"""Training: one loop that knows neither the objective nor the files."""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from complexity_dit.batches import StepBatches
from complexity_dit.build import build_model, build_state
from complexity_dit.config import TrainConfig
from complexity_dit.errors import RunStopped, UserError
from complexity_dit.files import file_aside, folder_aside
from complexity_dit.latents import load_training_data, open_latent_space
from complexity_dit.objective import build_scheduler, training_loss
from complexity_dit.processes import Processes
from complexity_dit.run_folder import claimed_folder
from complexity_dit.state import PipelineParts, TrainState, drop_old_checkpoints
from complexity_dit.stopping import StopRequest
from complexity_dit.train_log import TrainLog

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = {
    "out", "resume", "log_every", "checkpoint_every", "keep_last", "keep_every", "compile",
    "loader_workers",
}  # fmt: skip
"""Settings that a resumed run may change without any effect on its curve."""


def train(config: TrainConfig, build: Callable[..., ModelMixin] = build_model) -> Path:
    """Run one training, or go on with it.

    Writes `<out>/config.yaml`, `train_log.csv` (a row a step), `logs/` (tensorboard),
    `checkpoints/step-XXXXXXXX/` and, at the end, `pipeline/` with the EMA weights.

    Args:
        config: The whole run.
        build: Makes the network from (config, data); another denoiser with the forward arguments
            and config fields that `ComplexityDiTPipeline` reads trains in the same loop.

    Returns:
        The folder of the finished pipeline.

    Raises:
        UserError: For bad input, a folder that another run writes in, a loss that is not finite,
            or a disk that is full.
        RunStopped: After SIGTERM or SIGINT, when the step is finished and saved.
    """
    _check_numbers(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=config.out,
        # The first layer has no incoming velocity: that part of its controller gets no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    processes = Processes(accelerator)
    _check_batch(config, processes.count)
    try:
        with claimed_folder(Path(config.out), config.resume, processes) as checkpoint:
            return _train(config, build, accelerator, processes, checkpoint)
    finally:
        accelerator.end_training()  # takes the process group down: nothing may wait after it


def _train(
    config: TrainConfig,
    build: Callable[..., ModelMixin],
    accelerator: Accelerator,
    processes: Processes,
    checkpoint: Path | None,
) -> Path:
    out, settings = Path(config.out), dataclasses.asdict(config)
    checkpoints = out / "checkpoints"
    data = processes.main_first(lambda: load_training_data(config.data))
    space = open_latent_space(config.data)
    parts = PipelineParts(
        build_scheduler(config.objective),
        {field: dict(enumerate(names)) for field, names in data.label_names.items()},
        space.data if space else settings["data"],
        space,
    )
    torch.manual_seed(config.seed)
    state = build_state(build(config, data), config)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    state.average_from_here()
    if checkpoint is not None:
        _report_resume(state.load(checkpoint), config, checkpoint, processes.count)
    if processes.is_main:
        with file_aside(out / "config.yaml") as aside:
            aside.write_text(yaml.safe_dump(settings))
    accelerator.init_trackers("logs")
    if config.compile:
        state.model.compile_repeated_blocks(fullgraph=True)
    if config.gradient_checkpointing:
        state.model.enable_gradient_checkpointing()

    batches = DataLoader(
        StepBatches(data, config, processes.index, processes.count),
        batch_size=None,
        sampler=range(state.step, config.steps),
        num_workers=config.loader_workers,
    )
    skipped = state.guard.skipped if state.guard else 0
    log = TrainLog(out, state.step, accelerator, skipped)
    bar = tqdm(total=config.steps, initial=state.step, desc="training", unit="step",
               disable=not processes.is_main)  # fmt: skip
    with bar, StopRequest() as stop:
        for batch in batches:
            lr = state.lr_scheduler.get_last_lr()[0]
            loss, grad_norm, taken = _optimizer_step(accelerator, model, state, batch, config)
            state.step += 1
            log.add(state.step, loss, grad_norm, lr, skipped=not taken)
            bar.update()
            stopped_by = processes.largest(stop.number)
            save = stopped_by or _is_due(state.step, config)
            if save or state.step % config.log_every == 0:
                bar.set_postfix(log.flush(config))
            if save:
                saved = state.save(checkpoints, parts, settings, processes)
                processes.on_main(
                    lambda: drop_old_checkpoints(checkpoints, config.keep_last, config.keep_every)
                )
            if stopped_by and state.step < config.steps:
                raise RunStopped(
                    stopped_by,
                    f"after step {state.step} of {config.steps}, which is saved in {saved}: go on "
                    "with --resume auto",
                )
        network = state.network("ema")
        if processes.is_main:
            with folder_aside(out / "pipeline") as folder:
                parts.save(network, folder)
    return out / "pipeline"


def _is_due(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint is made after this step, whatever else happens."""
    intervals = [config.checkpoint_every, config.keep_every or config.steps, config.steps]
    return any(step % every == 0 for every in intervals)


def _optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainState,
    batch: dict[str, Tensor],
    config: TrainConfig,
) -> tuple[Tensor, Tensor, bool]:
    """One update of weights, schedule and EMA; of the schedule alone where the guard says no.

    Returns:
        Loss and gradient norm, still on device, and whether the step was taken.
    """
    batch = {name: value.to(accelerator.device) for name, value in batch.items()}
    parts = config.gradient_accumulation_steps
    chunks = {name: value.chunk(parts) for name, value in batch.items()}
    total = torch.zeros((), device=accelerator.device)
    for i in range(parts):
        part = {name: values[i] for name, values in chunks.items()}
        with accelerator.no_sync(model) if i + 1 < parts else nullcontext():
            prediction = model(
                part["x"],
                part["timestep"],
                part["labels"],
                kept_tokens=part.get("kept_tokens"),
                return_dict=False,
            )[0]
            loss = training_loss(prediction, part["target"], config.objective) / parts
            accelerator.backward(loss)
        total += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    assert grad_norm is not None  # accelerate gives none on XLA only
    taken = state.guard is None or state.guard.admits(float(grad_norm))
    if taken:
        state.optimizer.step()
        state.ema.step(state.model.parameters())
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    return total, grad_norm, taken


def _check_numbers(config: TrainConfig) -> None:
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every",
                 "checkpoint_every"):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)} must be at least 1")
    for name in ("loader_workers", "keep_last", "keep_every"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} {getattr(config, name)} must be at least 0")


def _check_batch(config: TrainConfig, processes: int) -> None:
    share = processes * config.gradient_accumulation_steps
    if config.batch_size % share:
        raise UserError(
            f"batch_size {config.batch_size} must be divisible by processes x accumulation steps, "
            f"{processes} x {config.gradient_accumulation_steps}"
        )


def _report_resume(
    saved: dict[str, Any], config: TrainConfig, checkpoint: Path, processes: int
) -> None:
    """Say what is gone on with, and name what differs: the curve will not be the same."""
    logger.info("resumed from %s at step %d", checkpoint, saved["step"])
    if saved["processes"] != processes:
        logger.info(
            "the checkpoint was written by %d process(es) and goes on in %d: with the same data, "
            "noise and batches, and sums that may be rounded differently",
            saved["processes"],
            processes,
        )
    now = dataclasses.asdict(config)
    changed = [
        key for key in now if key not in _FREE_TO_CHANGE and now[key] != saved["config"].get(key)
    ]
    if changed:
        logger.warning(
            "resuming with other settings than the checkpoint's in %s", ", ".join(changed)
        )
