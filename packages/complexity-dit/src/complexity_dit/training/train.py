"""Training: one loop that knows neither the objective nor the files."""

import dataclasses
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm

from complexity_dit.config import TrainConfig
from complexity_dit.data.latents import load_training_data, open_latent_space
from complexity_dit.distributed import Processes
from complexity_dit.training.batches import StepBatches, step_loader
from complexity_dit.training.callbacks import Look, NoiseLevels, TrainLog, build_callbacks
from complexity_dit.training.network import adapt, build_model, start_from
from complexity_dit.training.objective import build_scheduler, training_loss
from complexity_dit.training.state import (
    STATE_FILE,
    SavedPipeline,
    TrainState,
    prepared_state,
    whole,
)
from inl_core.run.checkpoints import checkpoint_to_resume, drop_old_checkpoints, lock_folder
from inl_core.run.errors import RunStopped, UserError
from inl_core.run.files import atomic_file, atomic_folder, remove_partial_writes
from inl_core.run.workers import report_dead_workers

# One optimizer step: forward and backward in parts, clip, update, average.


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


# Where curves go beside the CSV files: tensorboard, or another tracker of accelerate by name.

PROJECT = "complexity-dit"


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed: accelerate would leave it out in silence.

    Raises:
        UserError: Naming the package.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"report_to {name} needs the package {name}, which is not installed: "
            f"pip install {name}, or choose tensorboard or none"
        )


def start_tracker(
    name: str, accelerator: Accelerator, out: Path, settings: dict[str, Any], step: int
) -> None:
    """Begin to report.

    Args:
        name: tensorboard (writes `<out>/logs`), wandb, trackio (both as a run of the project
            complexity-dit named as the folder) or none.
        accelerator: Of the run.
        out: Its folder.
        settings: Its config.
        step: The step that it starts behind; what tensorboard has beyond it is not shown.
    """
    run = {"name": out.name, "config": settings}
    accelerator.init_trackers(
        "logs" if name == "tensorboard" else PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1} if step else {},
            "wandb": run | {"dir": str(out)},
            "trackio": run,
        },
    )


# The `Accelerator` of a run: what is ours to say about precision, DDP and FSDP2.


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Processes and devices come from the launcher; precision and tracker from the config.

    Raises:
        UserError: If the tracker is not installed, or FSDP of another version is asked for.
    """
    check_tracker(config.report_to)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.out,
        # The first layer has no incoming velocity: that part of its controller gets no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        fsdp_plugin=sharding_plugin(),
    )


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """How `accelerate launch` with FSDP shards, None without.

    accelerate's own policy would cast the inputs to bf16, where a timestep of 1000 has steps of 4.
    Here weights are gathered in fp32 and the forward runs under autocast, as with DDP.

    Raises:
        UserError: For FSDP 1, whose flat parameters have no names to save.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"fsdp_version is {version}; set fsdp_version: 2 in the accelerate config, as "
            "configs/accelerate/fsdp2.yaml does"
        )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
    )


# SIGTERM and SIGINT as a request: finish the step, save, leave.

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, a first signal is noted and nothing more.

    A second Ctrl-C interrupts at once, for whoever does not want to wait. A second SIGTERM does
    not: a cluster sends it to a launcher and to what it launched, and the launcher passes it on.

    Attributes:
        number: The signal that came first, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals; a training in another one is its
        # caller's to stop.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            logger.warning("%s: saving after this step", signal.Signals(number).name)


# The folder of a run: one run at a time writes in it, and where that run goes on from.


@contextmanager
def open_run_folder(out: Path, resume: str, processes: Processes) -> Iterator[Path | None]:
    """Hold a run's folder for this run, cleared of what a killed one left half-written.

    Args:
        out: The folder; made if it is not there.
        resume: auto, none, or a checkpoint folder.
        processes: Of the run; the main one holds the folder.

    Yields:
        The checkpoint to go on from, its checksums compared; None for a fresh start.

    Raises:
        UserError: Another run writes there, the folder is not free, there is no such checkpoint, or
            it is damaged.
    """
    with ExitStack() as held:

        def claim() -> Path | None:
            if resume not in ("auto", "none") and not (Path(resume) / STATE_FILE).is_file():
                raise UserError(
                    f"--resume {resume} is no checkpoint folder (no {STATE_FILE} in it)"
                )
            held.enter_context(lock_folder(out))
            for folder in (out, out / "checkpoints", out / "samples"):
                remove_partial_writes(folder)
            return checkpoint_to_resume(out, resume, STATE_FILE)

        yield processes.on_main(claim)


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
            open_run_folder(Path(config.out), config.resume, processes) as checkpoint,
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
        parts = SavedPipeline(
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
        with atomic_file(out / "config.yaml") as aside:
            aside.write_text(yaml.safe_dump(settings))
    start_tracker(config.report_to, accelerator, out, settings, state.step)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    batches = StepBatches(data, config, processes.index, processes.count)
    skipped = state.guard.skipped if state.guard else 0
    log = TrainLog(out, state.step, accelerator, skipped)
    noise = NoiseLevels(config.noise_bins, out, state.step, accelerator)
    looks = build_callbacks(config, data, parts, accelerator, processes, state.step)
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
            with atomic_folder(out / parts.folder_name) as folder:
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
