"""Pictures of numbers: the loss curve."""

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen is needed or wanted
import matplotlib.pyplot as plt

from inl_core.run.files import file_aside


def plot_loss(log: Path, target: Path) -> None:
    """Draw the loss over steps, with its running mean over 2 % of the run.

    Args:
        log: A run's `train_log.csv`.
        target: The PNG to write (aside, then renamed).
    """
    with log.open(newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    steps, losses = np.array(rows).T
    window = max(1, len(rows) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", ylim=(0.9 * smooth.min(), 1.1 * smooth.max()))
    axes.grid(alpha=0.3)
    axes.legend()
    with file_aside(target) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)
