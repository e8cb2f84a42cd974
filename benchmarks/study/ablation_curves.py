"""Metrics of a training curve."""

import csv

import numpy as np
from scipy.signal import savgol_filter

TREND = 51
"""Steps of the window whose quadratic fit is the trend of the loss."""
SPIKE_WINDOW, SPIKE_FACTOR, SPIKE_QUANTILE = 100, 2.0, 0.9


def read_curve(path):
    """Losses and gradient norms of all steps of a `train_log.csv`, (S,) each."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return (np.array([float(row[name]) for row in rows]) for name in ("loss", "grad_norm"))


def curve_metrics(losses, norms, warmup, unit):
    """Metrics of a curve: {name: (value, unit)}.

    final training loss: mean over the last 2 % of the steps. mean training loss: the area under the
    curve (trapezoids) over its length. detrended loss variance: variance of the losses minus a
    moving quadratic fit over `TREND` steps (Savitzky-Golay), after the warm-up; networks of one
    seed see the same batches, so the variance between batches is in all of them. gradient norm:
    quantiles after the warm-up, before clipping. gradient spikes: steps whose norm is more than
    twice the 0.9-quantile of the hundred before it, the rule of the image trainer's spike guard.

    Args:
        losses: One per step, (S,).
        norms: Gradient norms, one per step, (S,).
        warmup: Steps at the start that quantiles and variance leave out.
        unit: Unit of a loss.
    """
    later, quantiles = losses[warmup:], np.quantile(norms[warmup:], (0.5, 0.9, 0.99))
    window = min(TREND, len(later) - (1 - len(later) % 2))
    noise = later - savgol_filter(later, window, 2) if window > 2 else later - later.mean()
    return {
        "final training loss": (float(losses[-max(1, len(losses) // 50) :].mean()), unit),
        "mean training loss": (
            float(np.trapezoid(losses) / (len(losses) - 1)) if len(losses) > 1 else losses[0],
            unit,
        ),
        "detrended loss variance": (float(noise.var()), f"{unit}²"),
        "gradient norm, median": (float(quantiles[0]), ""),
        "gradient norm, 0.9": (float(quantiles[1]), ""),
        "gradient norm, 0.99": (float(quantiles[2]), ""),
        "gradient norm, largest": (float(norms[warmup:].max()), ""),
        "gradient spikes": (spikes(norms), "steps"),
    }


def spikes(norms):
    """Number of steps whose gradient norm is far above those before it."""
    if len(norms) <= SPIKE_WINDOW:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(norms, SPIKE_WINDOW)[:-1]
    limit = SPIKE_FACTOR * np.quantile(before, SPIKE_QUANTILE, axis=1)
    return int((norms[SPIKE_WINDOW:] > limit).sum())
