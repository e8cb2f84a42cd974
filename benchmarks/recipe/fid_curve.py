"""Figure of FID and KID over training, from the result.json files of a run's checkpoints.

python -m benchmarks.recipe.fid_curve STEP=result.json [STEP=result.json ...] --out curve.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")


def main():
    """Plot both metrics over steps, with the floor as a dashed line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="STEP=result.json")
    parser.add_argument("--floor", type=float, help="FID of training images against held-out ones")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    points = []
    for item in options.results:
        step, _, path = item.partition("=")
        result = json.loads(Path(path).read_text())
        points.append((int(step), result["metrics"], result["n_generated"]))
    points.sort(key=lambda point: point[0])
    steps, counts = [p[0] for p in points], {p[2] for p in points}
    if len(counts) > 1:
        parser.error(f"the results have different n: {sorted(counts)}")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    axes[0].plot(steps, [p[1]["fid"] for p in points], marker="o")
    if options.floor is not None:
        axes[0].axhline(options.floor, linestyle="--", color="0.5", label="training images")
        axes[0].legend()
    kid, deviation = ([p[1][name] for p in points] for name in ("kid_mean", "kid_std"))
    axes[1].errorbar(steps, kid, yerr=deviation, marker="o", capsize=3)
    for axis, name in zip(axes, ("FID", "KID"), strict=True):
        axis.set(xlabel="step", ylabel=f"{name}, n = {points[0][2]:,}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
