"""Training: one loop that knows neither the objective nor the files."""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

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
from complexity_dit.errors import UserError
from complexity_dit.files import folder_aside
from complexity_dit.latents import load_training_data, open_latent_space
from complexity_dit.objective import build_scheduler, training_loss
from complexity_dit.state import TrainState, drop_old_checkpoints, latest_checkpoint
from complexity_dit.train_log import TrainLog

logger = logging.getLogger(__name__)


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
        UserError: For bad input, a loss that is not finite, or a disk that is full.
    """
    out = Path(config.out)
    checkpoint = _checkpoint_to_resume(config, out)
    data = load_training_data(config.data)
    latent_space = open_latent_space(config.data)
    id2label = {field: dict(enumerate(names)) for field, names in data.label_names.items()}
    torch.manual_seed(config.seed)
    state = build_state(build(config, data), config)
    state.latent_space = latent_space
    if checkpoint is not None:
        _warn_of_changes(state.load(checkpoint), config)
        logger.info("resumed from %s at step %d", checkpoint, state.step)

    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=out,
        # The first layer has no incoming velocity: that part of its controller gets no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    _check_batch(config, accelerator.num_processes)
    is_main = accelerator.is_main_process
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    accelerator.init_trackers("logs")
    state.ema.to(accelerator.device)
    model, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    if config.compile:
        state.model.compile_repeated_blocks(fullgraph=True)
    if config.gradient_checkpointing:
        state.model.enable_gradient_checkpointing()

    batches = DataLoader(
        StepBatches(data, config, accelerator.process_index, accelerator.num_processes),
        batch_size=None,
        sampler=range(state.step, config.steps),
        num_workers=config.loader_workers,
    )
    scheduler = build_scheduler(config.objective)
    log = TrainLog(out, state.step, accelerator)
    with tqdm(
        total=config.steps, initial=state.step, desc="training", unit="step", disable=not is_main
    ) as bar:
        for batch in batches:
            lr = state.lr_scheduler.get_last_lr()[0]
            loss, grad_norm, taken = _optimizer_step(accelerator, model, state, batch, config)
            state.step += 1
            log.add(state.step, loss, grad_norm, lr, skipped=not taken)
            bar.update()
            save = state.step % config.checkpoint_every == 0 or state.step == config.steps
            if save or state.step % config.log_every == 0:
                bar.set_postfix(log.flush(config))
            if save and is_main:
                checkpoints = out / "checkpoints"
                state.save(checkpoints, scheduler, id2label, dataclasses.asdict(config))
                drop_old_checkpoints(checkpoints, config.keep_last)
    if is_main:
        with folder_aside(out / "pipeline") as folder:
            state.save_pipeline(folder, scheduler, id2label, dataclasses.asdict(config.data))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the process group down: nothing may wait after it
    return out / "pipeline"


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


def _check_batch(config: TrainConfig, processes: int) -> None:
    share = processes * config.gradient_accumulation_steps
    if config.batch_size % share:
        raise UserError(
            f"batch_size {config.batch_size} must be divisible by processes x accumulation steps, "
            f"{processes} x {config.gradient_accumulation_steps}"
        )


def _checkpoint_to_resume(config: TrainConfig, out: Path) -> Path | None:
    """The checkpoint that `resume` names, or None for a fresh start in a folder that is free."""
    if config.resume == "auto":
        return latest_checkpoint(out / "checkpoints")
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if config.resume == "none":
        if occupied:
            raise UserError(
                f"{out} exists; go on with --resume auto, or choose another --out for a new run"
            )
        return None
    checkpoint = Path(config.resume)
    if not (checkpoint / "state.json").is_file():
        raise UserError(f"--resume {checkpoint} is no checkpoint folder (no state.json in it)")
    if occupied and out.resolve() not in checkpoint.resolve().parents:
        raise UserError(f"{out} exists and {checkpoint} is not one of its checkpoints")
    return checkpoint


def _warn_of_changes(saved: dict, config: TrainConfig) -> None:
    """Name the settings that differ from the checkpoint's: the curve will not be the same."""
    harmless = {"out", "resume", "log_every", "checkpoint_every", "keep_last", "compile"}
    now = dataclasses.asdict(config)
    changed = [key for key in now if key not in harmless and now[key] != saved.get(key)]
    if changed:
        logger.warning(
            "resuming with other settings than the checkpoint's in %s", ", ".join(changed)
        )
