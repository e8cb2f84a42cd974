"""Pictures of numbers: the loss curve."""

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen is needed or wanted
import matplotlib.pyplot as plt

from inl_core.run.files import file_aside


def plot_loss(log: Path, heldout: Path, target: Path) -> None:
    """Draw the training loss over steps with its running mean, and the held-out loss.

    Args:
        log: A run's `train_log.csv`.
        heldout: Its `heldout_log.csv`; may have no rows.
        target: The PNG to write (aside, then renamed).
    """
    steps, losses = _columns(log, "loss")
    window = max(1, len(steps) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    at, held = _columns(heldout, "loss")
    if len(at):
        axes.plot(at, held, "o-", color="C1", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="nats a token", ylim=(0.9 * min([*smooth, *held]), None))
    axes.grid(alpha=0.3)
    axes.legend()
    with file_aside(target) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)


def _columns(path: Path, value: str) -> tuple[np.ndarray, np.ndarray]:
    with path.open(newline="") as file:
        rows = [(int(row["step"]), float(row[value])) for row in csv.DictReader(file)]
    steps, values = np.array(rows).reshape(-1, 2).T
    return steps, values
