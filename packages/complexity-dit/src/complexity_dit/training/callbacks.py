"""What a training records: loss curves, sample grids, evaluations, and the dynamics.

A callback reads a copy of the weights and draws from generators of its own, so the bits of the
training are the same with and without it. All processes make the copy, which may have to be
gathered; then the main process works and the others wait, except in an evaluation, which they
share.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from complexity_dit.config import EvalConfig, RunConfig, SampleConfig, TrainConfig
from complexity_dit.data.captions import Captions
from complexity_dit.data.latents import TrainingData, source_config
from complexity_dit.distributed import on_main
from complexity_dit.evaluation.evaluate import check_reference, evaluate
from complexity_dit.grids import save_grid
from complexity_dit.labels import MISSING
from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.sampling import drawn_labels, grid_labels, iter_samples
from complexity_dit.seeding import derive_seed
from complexity_dit.training.averages import AVERAGES_FILE, AVERAGES_FOLDER
from complexity_dit.training.batches import StepBatches, images_per_pass
from complexity_dit.training.objective import training_loss
from complexity_dit.training.state import SavedPipeline, TrainState
from complexity_dit.training.text import FrozenEncoder, PromptedNetwork, text_inputs
from inl_core import DYNAMICS_COLUMNS, read_dynamics
from inl_core.run.automatic import AUTO, Choice, choose_by_units, settled
from inl_core.run.checkpoints import (
    all_checkpoints,
    folder_of_step,
    latest_checkpoint,
    step_of,
    write_sums,
)
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError
from inl_core.run.files import atomic_folder, remove_folder, remove_partial_writes
from inl_core.run.folders import writing

logger = logging.getLogger(__name__)

Network = ComplexityDiTTransformer2DModel | PromptedNetwork


class TrainLog:
    """The loss curve, `train_log.csv`: one row per step, exact across resumes.

    Losses stay on the device until a flush, so that the device need not wait for the host at every
    step. `skipped` is the number of steps so far that the spike guard or the gradient scaler of
    fp16 has skipped.
    """

    fields = ("step", "loss", "grad_norm", "lr", "skipped")

    def __init__(
        self, out: Path, start_step: int, accelerator: Accelerator, skipped: int = 0
    ) -> None:
        self.out, self.accelerator, self.skipped = out, accelerator, skipped
        self.pending: list[tuple[int, Tensor, Tensor, float, bool]] = []
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.file = None
        if accelerator.is_main_process:
            self.file = CsvLog(out / "train_log.csv", self.fields, start_step)

    def add(
        self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, *, skipped: bool = False
    ) -> None:
        """Record one step; `skipped` if it updated nothing."""
        self.pending.append((step, loss, grad_norm, lr, skipped))

    def flush(self, config: RunConfig) -> dict[str, str]:
        """Write the recorded steps and return text for the progress bar.

        The speed is that since the last flush, with everything that was done between the steps.
        """
        mean = self.accelerator.reduce(torch.stack([loss for _, loss, *_ in self.pending]), "mean")
        rows = [
            (step, loss, float(norm), lr, int(skipped))
            for (step, _, norm, lr, skipped), loss in zip(self.pending, mean.tolist(), strict=True)
        ]
        self.pending.clear()
        self._stop_if_not_finite(rows, config)
        step, _, grad_norm, lr, _ = rows[-1]
        self.skipped += sum(row[-1] for row in rows)
        now = time.perf_counter()
        speed = (step - self.last_step) * config.batch_size / (now - self.last_time)
        self.last_step, self.last_time = step, now
        if self.file is not None:
            self.file.write(rows)
        finite = [row[1] for row in rows if math.isfinite(row[1])]  # skipped steps may not be
        average = sum(finite) / len(finite) if finite else math.nan
        counts = {"images_per_second": speed, "skipped_steps": self.skipped}
        self.accelerator.log({"loss": average, "grad_norm": grad_norm, "lr": lr} | counts, step)
        return {"loss": f"{average:.4f}", "images/s": f"{speed:.3g}"}

    def _stop_if_not_finite(self, rows: list[tuple], config: RunConfig) -> None:
        for step, loss, grad_norm, _, skipped in rows:
            # The guard skips any step that is not finite; the scaler of fp16, which finds its scale
            # this way, only if the loss is finite.
            expected = skipped and (config.optim.spike_factor or math.isfinite(loss))
            if not expected and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                kept = latest_checkpoint(self.out / "checkpoints")
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}; training stopped. The "
                    f"last good checkpoint is {kept or 'none'}: lower --optim.lr (now "
                    f"{config.optim.lr:g}) or raise --optim.warmup_steps, then --resume auto"
                )


class NoiseLevels:
    """Mean squared error in equal bins of the noise level t in [0, 1], `noise_levels.csv`.

    Columns are the step and, for each bin, the mean since the previous row, empty without images.
    Sums stay on the device, so no step waits for it. 0 bins switch it off.
    """

    def __init__(self, bins: int, out: Path, start_step: int, accelerator: Accelerator) -> None:
        self.bins, self.accelerator = bins, accelerator
        self.names = [f"t_{i / bins:.2f}_{(i + 1) / bins:.2f}" for i in range(bins)]
        self.sums = torch.zeros(2, bins, device=accelerator.device)
        self.file = None
        if bins and accelerator.is_main_process:
            self.file = CsvLog(out / "noise_levels.csv", ["step", *self.names], start_step)

    @torch.no_grad()
    def add(self, timestep: Tensor, prediction: Tensor, target: Tensor) -> None:
        """Add images: timestep in [0, 1000] (B,), prediction and target (B, C, Y, X)."""
        if not self.bins:
            return
        errors = (prediction.to(self.sums) - target.to(self.sums)).square().flatten(1).mean(1)
        level = timestep.float() / NUM_TRAIN_TIMESTEPS * self.bins
        chosen = level.long().clamp(0, self.bins - 1)
        self.sums.index_add_(1, chosen, torch.stack([errors, torch.ones_like(errors)]))

    def flush(self, step: int) -> None:
        """Write the means since the last flush, and start over."""
        if not self.bins:
            return
        sums, counts = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        means = [
            total / count if count else None for total, count in zip(sums, counts, strict=True)
        ]
        if self.file is not None:
            self.file.write([(step, *means)])
        by_name = zip(self.names, means, strict=True)
        self.accelerator.log({f"loss/{n}": mean for n, mean in by_name if mean is not None}, step)


class Callback(ABC):
    """Something done every `every` steps, at most once for each of them."""

    every: int
    file: CsvLog | None = None  # in the main process, of the callbacks that write one

    def is_done(self, step: int) -> bool:
        """Whether the files of this step exist: a run may be killed before. Main process only."""
        return self.file is not None and step in self.file.steps

    @abstractmethod
    def __call__(self, state: TrainState) -> None:
        """Do it for the current step. All processes call it."""


def build_callbacks(
    config: TrainConfig,
    data: TrainingData,
    heldout: TrainingData | None,
    saved: SavedPipeline,
    accelerator: Accelerator,
    start_step: int,
    frozen: FrozenEncoder | None = None,
) -> list[Callback]:
    """The callbacks that a config asks for; `frozen` reads the captions of held-out pictures."""
    callbacks: list[Callback] = []
    if config.ema.snapshot_every:
        callbacks.append(Snapshots(config, accelerator, start_step))
    if config.sample_every:
        callbacks.append(SampleGrids(config, saved, accelerator, (heldout or data).captions))
    if config.dynamics_every:
        callbacks.append(DynamicsMonitor(config, data, accelerator, start_step))
    if heldout is not None:
        tokenizer = saved.tokenizer
        callbacks.append(HeldoutLoss(config, heldout, accelerator, start_step, tokenizer, frozen))
    if config.evaluate_every:
        callbacks.append(Evaluation(config, data, saved, accelerator, start_step))
    return callbacks


class Snapshots(Callback):
    """The power-function averages at intervals, `<out>/averages/step-XXXXXXXX/` (`averages`)."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, start_step: int) -> None:
        self.every, self.folder = config.ema.snapshot_every, Path(config.out) / AVERAGES_FOLDER
        if accelerator.is_main_process:
            remove_partial_writes(self.folder)
            for later in all_checkpoints(self.folder):  # of a way that is now left
                if step_of(later) > start_step:
                    remove_folder(later)

    def is_done(self, step: int) -> bool:
        return folder_of_step(self.folder, step).exists()

    def __call__(self, state: TrainState) -> None:
        tensors, target = state.full_averages(), folder_of_step(self.folder, state.step)

        def write() -> None:
            with writing(target), atomic_folder(target) as folder:
                save_file(tensors, folder / AVERAGES_FILE)
                write_sums(folder)

        on_main(write)


GRID_COLUMNS, GRID_ROWS = 4, 12


class SampleGrids(Callback):
    """Grids of samples of the raw and of the averaged weights, from the same noise every time.

    Writes `<out>/samples/step-XXXXXXXX-raw.png` and `-ema.png`, one row for each of the first
    captions, of held-out pictures if there are some, or else labels of the first field.
    """

    def __init__(
        self,
        config: TrainConfig,
        saved: SavedPipeline,
        accelerator: Accelerator,
        captions: Captions | None = None,
    ) -> None:
        self.every, self.saved = config.sample_every, saved
        self.prompts: list[str] = []
        if captions is not None:
            first = range(min(GRID_ROWS, len(captions)))
            self.prompts = captions.captions_of(first, config.seed, 0)
        self.folder, self.device = Path(config.out) / "samples", accelerator.device

    def path(self, step: int, weights: str) -> Path:
        return self.folder / f"step-{step:08d}-{weights}.png"

    def is_done(self, step: int) -> bool:
        return self.path(step, "ema").exists()  # the one that is written last

    def __call__(self, state: TrainState) -> None:
        for weights in ("raw", "ema"):
            network = state.export(weights)
            on_main(partial(self._sample, network, self.path(state.step, weights)))

    def _sample(self, network: Network, path: Path) -> None:
        pipe = self.saved.build_pipeline(network).to(self.device)
        sampling, names, prompts = SampleConfig(), self.prompts, None
        if names:
            prompts = [name for name in names for _ in range(GRID_COLUMNS)]
            labels = torch.full((len(prompts), len(pipe.label_names)), MISSING)
        else:
            labels = grid_labels(pipe, GRID_COLUMNS)[: GRID_COLUMNS * GRID_ROWS]
            labels = drawn_labels(pipe, labels, sampling.seed)
            names = next(iter(pipe.label_names.values()), [])[:GRID_ROWS]
        batches = iter_samples(pipe, labels, sampling, progress=False, prompts=prompts)
        images = np.concatenate([batch for _, batch in batches])
        words = [shorten(name.replace("_", " "), 60, placeholder="…") for name in names]
        save_grid(images, GRID_COLUMNS, words, path)


class Evaluation(Callback):
    """`complexity-dit evaluate` on the averaged weights: FID and KID, shared by the processes.

    Writes `<out>/evaluations/step-XXXXXXXX/result.json`, and one row per metric into
    `<out>/metrics.csv`.
    """

    fields = ("step", "metric", "value", "n_generated", "n_reference")

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        saved: SavedPipeline,
        accelerator: Accelerator,
        start_step: int,
    ) -> None:
        self.every, self.saved = config.evaluate_every, saved
        self.accelerator, self.out = accelerator, Path(config.out)
        self.data = source_config(config.data)
        self.reference = config.evaluate_reference or self.data.source
        dtype = config.evaluate_dtype
        if dtype == AUTO:
            choice = choose_by_units(accelerator.device)
            if self.reference.endswith(".npz"):
                choice = Choice("no", "statistics are made in it")
            names = {"bf16": "bfloat16", "no": "float32"}
            dtype = settled("evaluate_dtype", choice._replace(value=names[choice.value]))
        self.settings = EvalConfig.brief(
            num_images=config.evaluate_num_images, device=str(accelerator.device), dtype=dtype,
            keep_images=False, overwrite=True, quiet=True,
        )  # fmt: skip
        try:
            size = (data.resolution, data.resolution)
            captions = data.captions is not None
            check_reference(self.reference, size, self.data, self.settings, captions)
        except UserError as error:
            raise UserError(f"evaluate_reference {self.reference}: {error}") from error
        if accelerator.is_main_process:
            self.file = CsvLog(self.out / "metrics.csv", self.fields, start_step)

    def __call__(self, state: TrainState) -> None:
        device, step = self.accelerator.device, state.step
        result = evaluate(
            self.saved.build_pipeline(state.export("ema")).to(device),
            self.reference,
            self.out / "evaluations" / f"step-{step:08d}",
            self.settings,
            data=self.data,
        )
        counts = (result["n_generated"], result["n_reference"])
        if self.file is not None:
            self.file.write([(step, name, v, *counts) for name, v in result["metrics"].items()])
        self.accelerator.log({f"evaluation/{k}": v for k, v in result["metrics"].items()}, step)


class HeldoutLoss(Callback):
    """The training loss of the averaged weights on held-out pictures, `heldout_log.csv`.

    Pictures, noise, times and dropped labels are a function of the run's seed and the same every
    time, so the curve shows changes of the network alone.
    """

    fields = ("step", "loss")

    def __init__(
        self,
        config: TrainConfig,
        heldout: TrainingData,
        accelerator: Accelerator,
        start_step: int,
        tokenizer: Any = None,
        frozen: FrozenEncoder | None = None,
    ) -> None:
        self.frozen = frozen
        self.every, self.accelerator, self.config = config.heldout_every, accelerator, config
        parts = config.gradient_accumulation_steps
        self.size = images_per_pass(config.batch_size, accelerator.num_processes, parts)
        own = replace(
            config,
            batch_size=min(config.heldout_num_images, len(heldout)),
            seed=derive_seed(config.seed, "heldout"),
            data=replace(config.data, flip=False, crop="center"),
            model=replace(config.model, token_drop_rate=0.0),
        )  # fmt: skip
        self.batches = StepBatches(heldout, own, 0, 1, tokenizer=tokenizer)
        if accelerator.is_main_process:
            self.file = CsvLog(Path(config.out) / "heldout_log.csv", self.fields, start_step)

    def __call__(self, state: TrainState) -> None:
        network = state.export("ema")
        on_main(partial(self._measure, network, state.step))

    @torch.no_grad()
    def _measure(self, network: Network, step: int) -> None:
        device, total = self.accelerator.device, 0.0
        network, batch = network.to(device), self.batches[0]
        for parts in zip(*(value.split(self.size) for value in batch.values()), strict=True):
            part = {name: value.to(device) for name, value in zip(batch, parts, strict=True)}
            part = part if self.frozen is None else self.frozen(part)
            inputs = (part["x"], part["timestep"], part["labels"])
            with self.accelerator.autocast():
                prediction = network(*inputs, return_dict=False, **text_inputs(part))[0]
            total += float(training_loss(prediction, part["target"])) * len(part["x"])
        loss = total / len(batch["x"])
        assert self.file is not None  # this is the main process
        self.file.write([(step, loss)])
        self.accelerator.log({"heldout_loss": loss}, step)


PROBE_SIZE = 8  # images that the dynamics are measured on


class DynamicsMonitor(Callback):
    """Statistics of the dynamics of every layer on a few noisy images, the same every time.

    The images have labels and no captions. Writes one row per layer into `<out>/dynamics.csv`: the
    statistics of `inl_core`, and the spectral radius of the transition matrix frozen at the mean
    coefficients. Below 1 that update contracts, which proves nothing for coefficients that vary.
    """

    fields = ("step", "layer", *DYNAMICS_COLUMNS)

    def __init__(
        self, config: TrainConfig, data: TrainingData, accelerator: Accelerator, start_step: int
    ) -> None:
        self.every, self.accelerator = config.dynamics_every, accelerator
        first = StepBatches(data, config, 0, 1)[0]
        self.probe = [first[name][:PROBE_SIZE] for name in ("x", "timestep", "labels")]
        if accelerator.is_main_process:
            self.file = CsvLog(Path(config.out) / "dynamics.csv", self.fields, start_step)

    def __call__(self, state: TrainState) -> None:
        # A copy that is not compiled, whose hooks would not run, and not sharded.
        network = state.export("raw")
        on_main(partial(self._measure, network, state.step))

    def _measure(self, network: Network, step: int) -> None:
        device = self.accelerator.device
        if isinstance(network, PromptedNetwork):
            network = network.network
        by_layer = read_dynamics(network.to(device), [tensor.to(device) for tensor in self.probe])
        if not by_layer:
            logger.warning("dynamics_every %d: this model has no dynamics", self.every)
            return
        assert self.file is not None  # this is the main process
        self.file.write(
            (step, name, *(stats[key] for key in DYNAMICS_COLUMNS))
            for name, stats in by_layer.items()
        )
        self.accelerator.log(
            {
                f"dynamics/{name}/{key}": value
                for name, stats in by_layer.items()
                for key, value in stats.items()
            },
            step,
        )
