"""Figure of the stability theory of the frozen update against simulation, and of two energies.

    python -m benchmarks.theory.stability_theory --out docs/results/stability/theory.png \
        --rows benchmarks/results.csv

Left: the edge of stability, by bisection on simulated growth and by theory, beta = 2 (1 + alpha) /
(dt gate) (Jury), for a grid of (alpha, gate, dt). Middle and right: the paper's energy (§4.3) and
the Lyapunov function of `inl_core.stability` along one trajectory, at the default coefficients and
at beta = 2.
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from benchmarks.common.results import append_rows, as_rows, commit

from inl_core import lyapunov, reference, transition_matrix

matplotlib.use("Agg")

STEPS = 4000
FREE = {"velocity_max": None, "mu_min": None, "mu_max": None}


def growth(alpha, beta, gate, dt):
    """Log of the growth over the second half of a simulated run, per point.

    The state is normalised to length 1 at every step, so neither growth nor decay overflows.
    """
    mu = torch.zeros(1, dtype=torch.float64)
    h, v = torch.ones_like(alpha), torch.full_like(alpha, 0.5)
    total = torch.zeros_like(alpha)
    for step in range(STEPS):
        # One number per point; the last dimension is the channel.
        h, v = (
            x.squeeze(-1)
            for x in reference.inl_update(
                h[..., None], v[..., None], alpha[..., None], beta[..., None], gate[..., None], mu,
                dt=dt, **FREE,
            )
        )  # fmt: skip
        length = torch.hypot(h, v)
        if step >= STEPS // 2:
            total += length.log()
        h, v = h / length, v / length
    return total


def simulated_boundary(alpha, gate, dt):
    """The beta at which growth begins, (points,), by bisection up to twice the theory's."""
    low = torch.zeros_like(alpha)
    high = 4 * (1 + alpha) / (dt * gate)
    for _ in range(16):
        middle = (low + high) / 2
        grows = growth(alpha, middle, gate, dt) > 0
        low, high = torch.where(grows, low, middle), torch.where(grows, middle, high)
    return (low + high) / 2


def energies(point, steps):
    """The paper's energy and xᵀPx from h - mu = 1, v = 0, over their initial values, (steps,)."""
    a, p = transition_matrix(*point), lyapunov(*point)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    energy, certificate = [], []
    for _ in range(steps):
        energy.append(x @ x / 2)
        certificate.append(x @ p @ x)
        x = a @ x
    return tuple(torch.stack(series) / series[0] for series in (energy, certificate))


def main():
    """Draw the figure; print the largest deviation and the peaks of the energies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    parser.add_argument("--rows", help="CSV to add the rows to")
    options = parser.parse_args()
    started_from = commit()  # before the figure changes a tracked file

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    worst = 0.0
    inertia = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for dt in (0.1, 0.5, 1.0):
        for gate in (0.25, 0.5, 1.0):
            gates = torch.full_like(inertia, gate)
            theory = 2 * (1 + inertia) / (dt * gates)
            found = simulated_boundary(inertia, gates, dt)
            worst = max(worst, float((found / theory - 1).abs().max()))
            line = axes[0].plot(inertia, theory, linewidth=1)[0]
            axes[0].plot(
                inertia, found, ".", color=line.get_color(), label=f"dt {dt:g}, gate {gate:g}"
            )
    axes[0].set(
        xlabel="alpha", ylabel="beta at the edge of stability", yscale="log",
        title="lines: 2 (1 + alpha) / (dt gate); dots: simulated",
    )  # fmt: skip
    axes[0].set_ylim(bottom=0.3)  # room for the legend
    axes[0].legend(fontsize=6, ncols=3, loc="lower right")
    rows = as_rows({"largest relative error": (worst, "")}, "Jury boundary", dtype="float64")
    for axis, beta in zip(axes[1:], (0.1, 2.0), strict=True):
        energy, certificate = energies((0.9, beta, 0.5, 0.1), 120)
        axis.plot(energy, label="energy of the paper, |e|²/2 + |v|²/2")
        axis.plot(certificate, label="Lyapunov function xᵀPx")
        axis.axhline(1, color="0.7", linewidth=0.8)
        axis.set(
            xlabel="step",
            ylabel="over its initial value",
            title=f"alpha 0.9, beta {beta:g}, gate 0.5",
        )
        axis.legend(fontsize=7)
        case = f"alpha 0.9, beta {beta:g}, gate 0.5, dt 0.1"
        rise = float(certificate.diff().max())
        values = {
            "peak of the energy": (float(energy.max()), ""),
            "largest rise of the Lyapunov function in a step": (rise, ""),
        }
        rows += as_rows(values, case, dtype="float64")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    for row in rows:
        print(f"{row['case']}: {row['metric']} {row['value']:.6g}")
    if options.rows:
        append_rows(options.rows, "stability", rows, "cpu", commit=started_from)


if __name__ == "__main__":
    main()
