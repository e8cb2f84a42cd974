"""Table and figure of the rows of `loops`; imports no network."""

import math
import statistics
from pathlib import Path

from benchmarks.common.results import made_by
from benchmarks.theory.physics_report import known_of

LOOPS = 8
"""Repetitions in training."""

MEASURED = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Repetitions after which the error is measured."""

SOLVED = 0.001
"""Error of a solved problem, in variances of the value."""

SHOWN = (4, 8, 16, 32)
ARMS = (
    "plain", "1/N", "step sizes", "damped", "recall", "momentum", "no carry", "unshared",
    "spring", "velocity",
)  # fmt: skip


def mean_and_error(values):
    """A mean and its standard error over seeds, as text; or how many values are not finite."""
    if infinite := sum(not math.isfinite(value) for value in values):
        return f"infinite in {infinite} of {len(values)}"
    middle = statistics.fmean(values)
    if len(values) < 2:
        return f"{middle:.3g}"
    return f"{middle:.3g} ± {statistics.stdev(values) / len(values) ** 0.5:.1g}"


def _runs(known):
    """{task: {arm: [{metric: value} of each seed]}}."""
    runs = {}
    for case, metrics in known.items():
        task, arm, _ = case.split(" / ")
        runs.setdefault(task, {}).setdefault(arm, []).append(metrics)
    return runs


def curves(known):
    """Markdown lines: the error by task and arm over the repetitions, mean and standard error.

    Args:
        known: {"TASK / ARM / seed S": {metric: value}}.
    """
    heads = [f"error, {k} loops" for k in SHOWN]
    columns = [*heads, f"loops to {SOLVED:g}", "parameters", "forward [MFLOP]", "seeds"]
    lines = ["| task | arm | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for task, arms in _runs(known).items():
        for arm in (arm for arm in ARMS if arm in arms):
            runs = arms[arm]
            cells = [
                mean_and_error([run[name] for run in runs]) if name in runs[0] else ""
                for name in (*heads, "loops to solve")
            ]
            cells += [f"{runs[0]['parameters']:,.0f}", f"{runs[0]['forward']:.3f}", str(len(runs))]
            lines.append(f"| {task} | {arm} | " + " | ".join(cells) + " |")
    return lines


def draw(known, path):
    """A PNG of the mean error over the repetitions, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = _runs(known)
    rows = -(-len(tasks) // 2)  # two difficulties of a task beside each other
    figure, axes = plt.subplots(
        rows, 2, figsize=(9, 3.6 * rows), squeeze=False, constrained_layout=True
    )
    for axis, (task, arms) in zip(axes.flat, tasks.items(), strict=False):
        for number, arm in enumerate(ARMS):
            if arm in arms:
                means = [
                    statistics.fmean(run[f"error, {k} loops"] for run in arms[arm])
                    for k in MEASURED
                ]
                width = 2.5 if arm == "velocity" else 1.2
                axis.plot(MEASURED, means, ".-", color=f"C{number}", label=arm, linewidth=width)
        axis.axvline(LOOPS, color="0.7", linestyle=":")
        axis.set(xscale="log", yscale="log", title=task, xlabel="repetitions")
        axis.set_xticks(MEASURED, [str(k) for k in MEASURED])
        axis.minorticks_off()
    for left in axes[:, 0]:
        left.set_ylabel("error / variance of the value")
    named = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    axis.legend(handles=[named[arm] for arm in ARMS if arm in named], fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def loops(rows):
    """The table as Markdown, with the run behind it."""
    return "\n".join([*curves(known_of(rows)), "", made_by(rows)]) if rows else ""
