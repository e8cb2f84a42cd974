"""What is looked at during training: pictures, distances to real ones, the dynamics.

A look reads a copy of the weights and draws from generators of its own, so the training's bits are
the same with and without it. All processes make the copy, which may have to be gathered; the main
one looks and the others wait for it, but for an evaluation, which they share.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import Accelerator

from complexity_dit.batches import StepBatches
from complexity_dit.config import SampleConfig, TrainConfig
from complexity_dit.data import load_data
from complexity_dit.distributed import Processes
from complexity_dit.evaluate import EvalConfig, evaluate
from complexity_dit.grids import save_grid
from complexity_dit.image_sets import is_source
from complexity_dit.latents import TrainingData, source_config
from complexity_dit.models.transformer import ComplexityDiTTransformer2DModel
from complexity_dit.parts import PipelineParts
from complexity_dit.pipelines.sampling import grid_labels, iter_samples
from complexity_dit.state import TrainState
from inl_core import DYNAMICS_COLUMNS, read_dynamics
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError

logger = logging.getLogger(__name__)

GRID_COLUMNS, GRID_ROWS = 4, 12
PROBE_IMAGES = 8


class Look(Protocol):
    """Something done every `every` steps, known by its step."""

    every: int

    def has(self, step: int) -> bool:
        """Whether the look of a step is there; a kill may have come before it. Main process."""
        ...

    def __call__(self, state: TrainState) -> None:
        """Look. All processes call it."""
        ...


def build_looks(
    config: TrainConfig,
    data: TrainingData,
    parts: PipelineParts,
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
        parts: PipelineParts,
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
        parts: PipelineParts,
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
        self.probe = [first[name][:PROBE_IMAGES] for name in ("x", "timestep", "labels")]
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
