"""`complexity-dit demo`: train a small model on the embedded art set, sample and evaluate it."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from complexity_dit.config import RUN_KIND, EvalConfig, ModelConfig, SampleConfig, TrainConfig
from complexity_dit.data.dataset import load_data
from complexity_dit.evaluation.evaluate import evaluate
from complexity_dit.grids import save_grid
from complexity_dit.pipelines.model_card import write_card
from complexity_dit.pipelines.sampling import drawn_labels, grid_labels, iter_samples, load_pipeline
from complexity_dit.training.state import STATE_FILE
from complexity_dit.training.train import train
from inl_core.run.checkpoints import claim_run
from inl_core.run.csv_log import read_columns
from inl_core.run.files import atomic_file

NUM_EVALUATED = 256
"""Generated and real images of the demo's FID; few, so that it takes minutes on two cores."""


def demo_config(out: str) -> TrainConfig:
    """The demo's run, also configs/dit/demo.yaml: the defaults, and dynamics, to be looked at."""
    dynamics = ModelConfig(dynamics_placement="branch", dynamics_adaptive="channel")
    return TrainConfig(out=out, model=dynamics)


def demo(out: str) -> None:
    """Train, sample and evaluate; a second call resumes an interrupted one.

    Writes what `train` writes, and `samples.png`, `loss.png`, `result.json` and `report.html`.

    Args:
        out: Folder of the demo.
    """
    folder = Path(out)
    with claim_run(folder, STATE_FILE, RUN_KIND):
        _demo(folder)


def _demo(folder: Path) -> None:
    start = time.perf_counter()
    config = replace(demo_config(str(folder)), resume="auto")
    # Fill the cache with several processes; their number is not part of the run's settings.
    load_data(replace(config.data, num_workers=os.cpu_count() or 1), "train")
    pipeline = train(config)
    plot_loss(folder / "train_log.csv", folder / "loss.png")

    pipe = load_pipeline(str(pipeline))
    sampling = SampleConfig()  # guided: the numbers are those of the pictures that it shows
    labels = drawn_labels(pipe, grid_labels(pipe, columns=8), sampling.seed)
    images = np.concatenate([batch for _, batch in iter_samples(pipe, labels, sampling)])
    row_names = [name.replace("_", " ") for name in next(iter(pipe.label_names.values()))]
    save_grid(images, 8, row_names, folder / "samples.png")

    evaluation = EvalConfig(num_images=NUM_EVALUATED, floors=True, overwrite=True)
    evaluate(pipeline, "art", folder, evaluation, sampling)
    write_card(pipeline, folder / "result.json", folder / "samples.png", "complexity-dit-demo")
    print(
        f"""
The demo took {(time.perf_counter() - start) / 60:.1f} minutes. In {folder}:
  samples.png    samples, one row per school
  loss.png       the training loss
  result.json    FID, KID and every setting they depend on
  report.html    the same, for the browser
  pipeline/      the model; load it with
                 DiffusionPipeline.from_pretrained("{pipeline}", trust_remote_code=True)

Next:
  complexity-dit sample {pipeline} --out picture.png --labels.style Orphism Op_Art
  complexity-dit evaluate {pipeline} --reference art --out runs/evaluation
  complexity-dit train --config configs/dit/wikiart-cpu.yaml --data.source imagefolder:PATH"""
    )


def plot_loss(log: Path, target: Path) -> None:
    """Plot the loss over steps, with its running mean over 2 % of the run.

    Args:
        log: A run's `train_log.csv`.
        target: The PNG to write.
    """
    steps, losses = read_columns(log, "step", "loss")
    window = max(1, len(steps) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", ylim=(0.9 * smooth.min(), 1.1 * smooth.max()))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(target) as path:
        figure.savefig(path, format="png", dpi=120)
