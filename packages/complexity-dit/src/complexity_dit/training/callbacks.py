"""What is looked at during training: pictures, distances to real ones, the dynamics.

A look reads a copy of the weights and draws from generators of its own, so the training's bits are
the same with and without it. All processes make the copy, which may have to be gathered; the main
one looks and the others wait for it, but for an evaluation, which they share.
"""

import logging
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from complexity_dit.config import EvalConfig, SampleConfig, TrainConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.data.latents import TrainingData, source_config
from complexity_dit.distributed import Processes
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.evaluation.image_sets import is_source
from complexity_dit.grids import save_grid
from complexity_dit.models.tokens import NUM_TRAIN_TIMESTEPS
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.pipelines.sampling import grid_labels, iter_samples
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.state import SavedPipeline, TrainState, whole
from inl_core import DYNAMICS_COLUMNS, read_dynamics
from inl_core.run.checkpoints import latest_checkpoint
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError

# The loss by noise level: which part of the way from noise to image is learned how well.


class NoiseLevels:
    """Mean squared error in equal bins of the noise level t in [0, 1], between two flushes.

    Sums stay on the device: no step waits for it. Columns of `noise_levels.csv` are the step and,
    for each bin, the mean since the row before; a bin without an image is empty.

    Args:
        bins: How many; 0 switches it off.
        out: Folder of the run.
        start_step: The step that a resumed run starts behind.
        accelerator: Sums over the processes.
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
        """Count images: timestep in [0, 1000] (B,), prediction and target (B, C, Y, X)."""
        if not self.bins:
            return
        errors = (prediction.to(self.sums) - target.to(self.sums)).square().flatten(1).mean(1)
        level = timestep.float() / NUM_TRAIN_TIMESTEPS * self.bins
        chosen = level.long().clamp(0, self.bins - 1)
        self.sums.index_add_(1, chosen, torch.stack([errors, torch.ones_like(errors)]))

    def flush(self, step: int) -> None:
        """Write the means since the last flush, and forget them."""
        if not self.bins:
            return
        sums, counts = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        means = [
            total / count if count else None for total, count in zip(sums, counts, strict=True)
        ]
        if self.file is not None:
            self.file.write([(step, *means)])
        seen = zip(self.names, means, strict=True)
        self.accelerator.log({f"loss/{n}": mean for n, mean in seen if mean is not None}, step)


# The loss curve: one row a step, written in batches, exact across resumes.

LOG_FIELDS = ("step", "loss", "grad_norm", "lr", "skipped")


class TrainLog:
    """Losses of every step, kept on the device until a flush writes them out.

    Asking for each loss at once would make the device wait for the host at every step.
    """

    def __init__(
        self, out: Path, start_step: int, accelerator: Accelerator, skipped: int = 0
    ) -> None:
        self.out, self.accelerator, self.skipped = out, accelerator, skipped
        self.pending: list[tuple[int, Tensor, Tensor, float, bool]] = []
        self.start_step, self.start_time = start_step, time.perf_counter()
        self.file = None
        if accelerator.is_main_process:
            self.file = CsvLog(out / "train_log.csv", LOG_FIELDS, start_step)

    def add(
        self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, *, skipped: bool = False
    ) -> None:
        """Keep one step; `skipped` says that the spike guard did not take it."""
        self.pending.append((step, loss, whole(grad_norm), lr, skipped))

    def flush(self, config: TrainConfig) -> dict[str, str]:
        """Write pending rows; stop the run if one of them is not finite.

        Returns:
            Text for the progress bar.

        Raises:
            UserError: Naming the first step whose loss or gradient norm is not finite.
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
        seconds = time.perf_counter() - self.start_time
        speed = (step - self.start_step) * config.batch_size / seconds
        if self.file is not None:
            self.file.write(rows)
        finite = [row[1] for row in rows if math.isfinite(row[1])]  # all but skipped steps'
        average = sum(finite) / len(finite) if finite else math.nan
        self.accelerator.log(
            {
                "loss": average,
                "grad_norm": grad_norm,
                "lr": lr,
                "images_per_second": speed,
                "skipped_steps": self.skipped,
            },
            step,
        )
        return {"loss": f"{average:.4f}", "images/s": f"{speed:.0f}"}

    def _stop_if_not_finite(self, rows: list[tuple], config: TrainConfig) -> None:
        for step, loss, grad_norm, _, skipped in rows:
            if skipped:
                continue
            # fp16's gradient scaler meets infinite norms by design and skips those steps.
            bad_norm = config.mixed_precision != "fp16" and not math.isfinite(grad_norm)
            if bad_norm or not math.isfinite(loss):
                kept = latest_checkpoint(self.out / "checkpoints")
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}; training stopped. The "
                    f"last good checkpoint is {kept or 'none'}: lower --optim.lr (now "
                    f"{config.optim.lr:g}) or raise --optim.warmup_steps, then --resume auto"
                )


logger = logging.getLogger(__name__)

GRID_COLUMNS, GRID_ROWS = 4, 12
PROBE_SIZE = 8


class Look(Protocol):
    """Something done every `every` steps, known by its step."""

    every: int

    def has(self, step: int) -> bool:
        """Whether the look of a step is there; a kill may have come before it. Main process."""
        ...

    def __call__(self, state: TrainState) -> None:
        """Look. All processes call it."""
        ...


def build_callbacks(
    config: TrainConfig,
    data: TrainingData,
    parts: SavedPipeline,
    accelerator: Accelerator,
    processes: Processes,
    start_step: int,
) -> list[Look]:
    """The looks that a config asks for.

    Raises:
        UserError: If there is nothing to compare with; better now than at the first evaluation.
    """
    looks: list[Look] = []
    if config.sample_every:
        looks.append(SampleGrids(config, parts, accelerator, processes))
    if config.dynamics_every:
        looks.append(DynamicsMonitor(config, data, accelerator, processes, start_step))
    if config.evaluate_every:
        looks.append(Evaluation(config, parts, accelerator, processes, start_step))
    return looks


class SampleGrids:
    """A grid of pictures of the raw and of the averaged weights, the same noise every time.

    Writes `<out>/samples/step-XXXXXXXX-raw.png` and `-ema.png`: a row for each of the first labels
    of the first field.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: SavedPipeline,
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self.every, self.parts, self.processes = config.sample_every, parts, processes
        self.folder, self.device = Path(config.out) / "samples", accelerator.device

    def path(self, step: int, weights: str) -> Path:
        return self.folder / f"step-{step:08d}-{weights}.png"

    def has(self, step: int) -> bool:
        return self.path(step, "ema").exists()  # the one that is painted last

    def __call__(self, state: TrainState) -> None:
        for weights in ("raw", "ema"):
            network = state.network(weights)
            self.processes.on_main(partial(self._paint, network, self.path(state.step, weights)))

    def _paint(self, network: ComplexityDiTTransformer2DModel, path: Path) -> None:
        pipe = self.parts.around(network).to(self.device)
        labels = grid_labels(pipe, GRID_COLUMNS)[: GRID_COLUMNS * GRID_ROWS]
        painted = iter_samples(pipe, labels, SampleConfig(), progress=False)
        images = np.concatenate([batch for _, batch in painted])
        names = next(iter(pipe.label_names.values()), [])[:GRID_ROWS]
        save_grid(images, GRID_COLUMNS, [name.replace("_", " ") for name in names], path)


class Evaluation:
    """`complexity-dit evaluate` on the averaged weights: FID and KID, shared by the processes.

    Writes `<out>/evaluations/step-XXXXXXXX/result.json`, and a row for each metric into
    `<out>/metrics.csv`.
    """

    fields = ("step", "metric", "value", "n_generated", "n_reference")

    def __init__(
        self,
        config: TrainConfig,
        parts: SavedPipeline,
        accelerator: Accelerator,
        processes: Processes,
        start_step: int,
    ) -> None:
        self.every, self.config, self.parts = config.evaluate_every, config, parts
        self.accelerator, self.processes = accelerator, processes
        self.out = Path(config.out)
        self.data = source_config(config.data)
        self.reference = config.evaluate_reference or self.data.source
        self.file: CsvLog | None = None
        processes.on_main(partial(self._open, start_step))

    def _open(self, start_step: int) -> None:
        if is_source(self.reference):
            load_data(replace(self.data, source=self.reference), "heldout")
        elif not Path(self.reference).exists():
            raise UserError(
                f"evaluate_reference {self.reference} is not there; give a data source, a folder "
                "of pictures or a statistics .npz"
            )
        self.file = CsvLog(self.out / "metrics.csv", self.fields, start_step)

    def has(self, step: int) -> bool:
        return self.file is not None and step in self.file.steps

    def __call__(self, state: TrainState) -> None:
        # Every process paints and measures its share; the main one writes.
        device, step = self.accelerator.device, state.step
        result = evaluate(
            self.parts.around(state.network("ema")).to(device),
            self.reference,
            self.out / "evaluations" / f"step-{step:08d}",
            EvalConfig.brief(
                num_images=self.config.evaluate_num_images,
                device=str(device),
                keep_images=False,
                overwrite=True,
                quiet=True,
            ),
            SampleConfig(),
            self.data,
        )
        counts = (result["n_generated"], result["n_reference"])
        if self.file is not None:
            self.file.write([(step, name, v, *counts) for name, v in result["metrics"].items()])
        self.accelerator.log({f"evaluation/{k}": v for k, v in result["metrics"].items()}, step)


class DynamicsMonitor:
    """What every layer's dynamics do with a few noisy images that are the same at every look.

    A row a layer into `<out>/dynamics.csv`: the statistics of `inl_core`, and the spectral radius
    of the transition matrix frozen at the mean coefficients: below 1 that update shrinks, which is
    no certificate for varying ones.
    """

    fields = ("step", "layer", *DYNAMICS_COLUMNS)

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        accelerator: Accelerator,
        processes: Processes,
        start_step: int,
    ) -> None:
        self.every, self.accelerator, self.processes = config.dynamics_every, accelerator, processes
        first = StepBatches(data, config, 0, 1)[0]
        self.probe = [first[name][:PROBE_SIZE] for name in ("x", "timestep", "labels")]
        self.file = None
        if processes.is_main:
            self.file = CsvLog(Path(config.out) / "dynamics.csv", self.fields, start_step)

    def has(self, step: int) -> bool:
        return self.file is not None and step in self.file.steps

    def __call__(self, state: TrainState) -> None:
        # A copy: neither compiled, which would note nothing, nor sharded.
        network = state.network("raw")
        self.processes.on_main(partial(self._note, network, state.step))

    def _note(self, network: ComplexityDiTTransformer2DModel, step: int) -> None:
        device = self.accelerator.device
        found = read_dynamics(network.to(device), [tensor.to(device) for tensor in self.probe])
        if not found:
            logger.warning("dynamics_every %d: the model has no dynamics to look at", self.every)
            return
        assert self.file is not None  # this is the main process
        self.file.write(
            (step, name, *(stats[key] for key in DYNAMICS_COLUMNS)) for name, stats in found.items()
        )
        self.accelerator.log(
            {
                f"dynamics/{name}/{key}": value
                for name, stats in found.items()
                for key, value in stats.items()
            },
            step,
        )
