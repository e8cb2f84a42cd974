"""The figure of docs/maths.md: a map of stability and phase portraits of the update.

    python -m benchmarks.theory.phase_portraits --out docs/maths/phase.png

The map shows frozen points as (alpha, p) with p = dt gate beta, on which alone both eigenvalues
depend. The portraits are simulated with the definition (`inl_core.reference`); ellipses are level
sets of the Lyapunov function.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from inl_core import lyapunov, reference

matplotlib.use("Agg")

# name: (alpha, beta, gate, dt, velocity_max, steps)
POINTS = {
    "A  the defaults": (0.9, 0.1, 0.5, 0.1, None, 120),
    "B  overdamped": (0.5, 0.4, 0.5, 0.1, None, 120),
    "C  beta at its bound": (0.9, 2.0, 0.5, 0.1, None, 120),
    "D  a whole step, alternating": (0.3, 1.9, 0.95, 1.3, None, 24),
    "E  as C, velocity clipped at 1": (0.9, 2.0, 0.5, 0.1, 1.0, 120),
}


def walk(alpha, beta, gate, dt, velocity_max, steps, start):
    """The path (e, v) from `start`, (steps + 1, 2), with mu = 0."""
    mu = torch.zeros(1, dtype=torch.float64)
    h, v = (torch.tensor([x], dtype=torch.float64) for x in start)
    path = [(float(h), float(v))]
    for _ in range(steps):
        h, v = reference.inl_update(
            h, v, alpha, beta, gate, mu,
            dt=dt, velocity_max=velocity_max, mu_min=None, mu_max=None,
        )  # fmt: skip
        path.append((float(h), float(v)))
    return np.array(path)


def level_set(p, through):
    """Points of the ellipse xᵀPx = const that passes `through`, (200, 2)."""
    factor = torch.linalg.cholesky(p).numpy()
    size = math.sqrt(through @ p.numpy() @ through)
    angle = np.linspace(0, 2 * math.pi, 200)
    circle = size * np.stack([np.cos(angle), np.sin(angle)])
    return np.linalg.solve(factor.T, circle).T


def draw_map(axis):
    alpha = np.linspace(0, 1, 400)
    low, high, edge = (1 - np.sqrt(alpha)) ** 2, (1 + np.sqrt(alpha)) ** 2, 2 * (1 + alpha)
    axis.fill_between(alpha, 0, low, color="tab:green", alpha=0.25, label="overdamped")
    axis.fill_between(alpha, low, high, color="tab:blue", alpha=0.2, label="spirals")
    axis.fill_between(alpha, high, edge, color="tab:orange", alpha=0.3, label="alternates")
    axis.plot(alpha, edge, color="tab:red", label="p = 2 (1 + alpha): the edge")
    axis.axhline(0.2, color="0.3", linestyle=":", label="largest p at dt 0.1, beta <= 2")
    for name, (a, beta, gate, dt, *_) in POINTS.items():
        if name[0] != "E":
            axis.plot(a, dt * gate * beta, "k.")
            axis.annotate(f" {name[0]}", (a, dt * gate * beta))
    axis.set(
        xlabel="alpha", ylabel="p = dt · gate · beta", title="the frozen update",
        xlim=(0, 1), ylim=(3e-3, 4.5), yscale="log",
    )  # fmt: skip
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    options = parser.parse_args()
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), constrained_layout=True)
    draw_map(axes[0, 0])
    for axis, (name, (alpha, beta, gate, dt, bound, steps)) in zip(
        axes.flat[1:], POINTS.items(), strict=True
    ):
        for angle in np.arange(6) * math.pi / 3:
            start = (math.cos(angle), math.sin(angle))
            path = walk(alpha, beta, gate, dt, bound, steps, start)
            axis.plot(*path.T, ".-", markersize=3, linewidth=0.7)
            axis.plot(*start, "k.", markersize=5)
        for size in (0.5, 1.0):
            through = np.array([size, 0.0])
            curve = level_set(lyapunov(alpha, beta, gate, dt), through)
            axis.plot(*curve.T, color="0.6", linewidth=0.8, zorder=0)
        about = f"alpha {alpha:g}, beta {beta:g}, gate {gate:g}, dt {dt:g}"
        axis.set(title=f"{name}\n{about}", xlabel="e = h − mu", ylabel="v")
        axis.title.set_fontsize(9)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
