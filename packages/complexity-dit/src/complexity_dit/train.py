"""Training: one loop that knows neither the objective nor the files."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers import ModelMixin
from tqdm.auto import tqdm

from complexity_dit.acceleration import make_accelerator
from complexity_dit.batches import StepBatches, step_loader
from complexity_dit.build import build_model, prepared_state
from complexity_dit.config import TrainConfig
from complexity_dit.distributed import Processes
from complexity_dit.init_from import start_from
from complexity_dit.latents import load_training_data, open_latent_space
from complexity_dit.looks import Look, build_looks
from complexity_dit.lora import adapt
from complexity_dit.noise_levels import NoiseLevels
from complexity_dit.objective import build_scheduler
from complexity_dit.parts import PipelineParts
from complexity_dit.run_folder import claimed_folder
from complexity_dit.state import TrainState
from complexity_dit.step import optimizer_step
from complexity_dit.stopping import StopRequest
from complexity_dit.trackers import start_tracker
from complexity_dit.train_log import TrainLog
from inl_core.run.checkpoints import drop_old_checkpoints
from inl_core.run.errors import RunStopped, UserError
from inl_core.run.files import file_aside, folder_aside
from inl_core.run.workers import report_dead_workers

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = {
    "out", "resume", "init_from", "log_every", "checkpoint_every", "keep_last", "keep_every",
    "compile", "loader_workers", "report_to", "noise_bins", "dynamics_every", "sample_every",
    "evaluate_every", "evaluate_num_images", "evaluate_reference",
}  # fmt: skip
"""Settings that a resumed run may change without any effect on its curve."""


def train(config: TrainConfig, build: Callable[..., ModelMixin] = build_model) -> Path:
    """Run one training, or go on with it.

    Writes `<out>/config.yaml`, `train_log.csv` (a row a step), `logs/` (tensorboard),
    `checkpoints/step-XXXXXXXX/`, what the looks write (see `looks`, `noise_levels`) and, at the
    end, `pipeline/` with the EMA weights, or `adapter/` of `config.lora`.

    Args:
        config: The whole run.
        build: Makes the network from (config, data); another denoiser with the forward arguments
            and config fields that `ComplexityDiTPipeline` reads trains in the same loop.

    Returns:
        The folder of the finished pipeline or adapter.

    Raises:
        UserError: For bad input, a folder that another run writes in, a loss that is not finite,
            a disk that is full, a damaged checkpoint, or a process of the run that is gone.
        RunStopped: After SIGTERM or SIGINT, when the step is finished and saved.
    """
    _check_numbers(config)
    accelerator = make_accelerator(config)
    processes = Processes(accelerator)
    _check_batch(config, processes.count)
    try:
        with (
            report_dead_workers(),
            claimed_folder(Path(config.out), config.resume, processes) as checkpoint,
        ):
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
    if config.lora.rank:
        network, parts, data = adapt(config, data)
    else:
        space = open_latent_space(config.data)
        parts = PipelineParts(
            build_scheduler(config.objective),
            {field: dict(enumerate(names)) for field, names in data.label_names.items()},
            space.data if space else settings["data"],
            space,
        )
        torch.manual_seed(config.seed)
        network = build(config, data)
        if config.init_from is not None and checkpoint is None:
            start_from(network, config.init_from, data.label_names)
    state, model = prepared_state(network, config, accelerator)
    if checkpoint is not None:
        saved = state.load(checkpoint, parts, data.label_names)
        _report_resume(saved, config, checkpoint, processes.count)
    if processes.is_main:
        with file_aside(out / "config.yaml") as aside:
            aside.write_text(yaml.safe_dump(settings))
    start_tracker(config.report_to, accelerator, out, settings, state.step)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    batches = StepBatches(data, config, processes.index, processes.count)
    skipped = state.guard.skipped if state.guard else 0
    log = TrainLog(out, state.step, accelerator, skipped)
    noise = NoiseLevels(config.noise_bins, out, state.step, accelerator)
    looks = build_looks(config, data, parts, accelerator, processes, state.step)
    if state.step:
        _look(looks, state, processes)  # a kill may have come between a checkpoint and its looks
    bar = tqdm(total=config.steps, initial=state.step, desc="training", unit="step",
               disable=not processes.is_main)  # fmt: skip
    with bar, StopRequest() as stop:
        for batch in step_loader(batches, range(state.step, config.steps), accelerator.device):
            lr = state.lr_scheduler.get_last_lr()[0]
            loss, grad_norm, taken = optimizer_step(accelerator, model, state, batch, config, noise)
            state.step += 1
            log.add(state.step, loss, grad_norm, lr, skipped=not taken)
            bar.update()
            stopped_by = processes.largest(stop.number)
            save = stopped_by or _is_due(state.step, config)
            if save or state.step % config.log_every == 0:
                bar.set_postfix(log.flush(config))
                noise.flush(state.step)
            if save:
                newest = state.save(checkpoints, parts, settings, processes)
                processes.on_main(
                    lambda: drop_old_checkpoints(checkpoints, config.keep_last, config.keep_every)
                )
            if stopped_by and state.step < config.steps:
                raise RunStopped(
                    stopped_by,
                    f"after step {state.step} of {config.steps}, which is saved in {newest}: go on "
                    "with --resume auto",
                )
            _look(looks, state, processes)
        averaged = state.network("ema")

        def save_final() -> None:
            with folder_aside(out / parts.folder_name) as folder:
                parts.save(averaged, folder)

        processes.on_main(save_final)
    return out / parts.folder_name


def _is_due(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint is made after this step, whatever else happens."""
    intervals = (config.checkpoint_every, config.keep_every, config.evaluate_every, config.steps)
    return any(every and step % every == 0 for every in intervals)


def _look(looks: list[Look], state: TrainState, processes: Processes) -> None:
    """Look at what is due after this step and not there yet."""
    for look in looks:
        if state.step % look.every == 0 and not processes.on_main(partial(look.has, state.step)):
            look(state)


def _check_numbers(config: TrainConfig) -> None:
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every",
                 "checkpoint_every"):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)} must be at least 1")
    for name in ("loader_workers", "keep_last", "keep_every", "noise_bins", "dynamics_every",
                 "sample_every", "evaluate_every"):  # fmt: skip
        if getattr(config, name) < 0:
            raise UserError(f"{name} {getattr(config, name)} must be at least 0")
    if config.lora.rank < 0:
        raise UserError(f"lora.rank {config.lora.rank} must be at least 0 (0 is no adapter)")


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
    if saved.get("processes", processes) != processes:
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
