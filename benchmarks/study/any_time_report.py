"""Tables and figure of the rows of `any_time_lm` and `any_time_dit`; imports no network."""

import statistics
import textwrap
from pathlib import Path

from benchmarks.common.results import made_by
from benchmarks.study import loops_report
from benchmarks.study.loops_report import mean_and_error
from benchmarks.theory.physics_report import known_of

LOOPS = 6
"""Repetitions in training."""

COUNTS = {"lm": (1, 2, 3, 4, 6, 8, 12, 18, 24), "dit": (3, 6, 12)}
"""Repetitions after which a model is measured."""

SAMPLED = {"sampled": "plain", "velocity, sampled": "velocity"}
"""Arms that are trained with a drawn number of repetitions, with the arm that they are else."""

ARMS = (
    "plain", "momentum", "velocity", *SAMPLED, "spring", "no carry", "unshared", "step sizes",
    "1/N", "damped", "recall",
)  # fmt: skip
"""In the order in which they are run."""

assert set(ARMS) - set(SAMPLED) == set(loops_report.ARMS)


def _runs(known):
    """{data and amount: {arm: [{metric: value} of each seed]}}."""
    runs = {}
    for case, metrics in known.items():
        shape, arm, _ = case.rsplit(" / ", 2)
        runs.setdefault(shape, {}).setdefault(arm, []).append(metrics)
    return runs


def _measures(runs):
    """{measure: its numbers of repetitions in ascending order} of the metrics NAME, K loops."""
    measures = {}
    for metric in dict.fromkeys(metric for metrics in runs for metric in metrics):
        if metric.endswith(" loops"):
            name, _, count = metric.removesuffix(" loops").rpartition(", ")
            measures.setdefault(name, set()).add(int(count))
    return {name: sorted(counts) for name, counts in measures.items()}


def curves(known):
    """Markdown lines: each measure by arm over the repetitions, mean and standard error.

    Args:
        known: {"DATA AND AMOUNT / ARM / seed S": {metric: value}}.
    """
    lines = []
    for shape, arms in _runs(known).items():
        for measure, counts in _measures(run for runs in arms.values() for run in runs).items():
            if measure.endswith("_std"):
                continue
            heads = [*(f"{count}" for count in counts), "parameters", "training [s]", "seeds"]
            lines += [
                f"{measure} by repetitions, {shape}:", "",
                "| arm | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads),
            ]  # fmt: skip
            for arm in (arm for arm in ARMS if arm in arms):
                runs = arms[arm]
                names = [f"{measure}, {count} loops" for count in counts]
                cells = [
                    mean_and_error([run[name] for run in runs]) if name in runs[0] else ""
                    for name in names
                ]
                seconds = statistics.fmean(run["training"] for run in runs)
                cells += [f"{runs[0]['parameters']:,.0f}", f"{seconds:.0f}", str(len(runs))]
                lines.append(f"| {arm} | " + " | ".join(cells) + " |")
            lines.append("")
    return lines[:-1]


def draw(known, path):
    """A PNG of the first measure over the repetitions, one panel per data and amount."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = _runs(known)
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False, constrained_layout=True
    )
    for axis, (shape, arms) in zip(axes[0], shapes.items(), strict=True):
        measure, counts = next(iter(_measures(run for rs in arms.values() for run in rs).items()))
        for number, arm in enumerate(ARMS):
            if arm not in arms:
                continue
            names = {count: f"{measure}, {count} loops" for count in counts}
            means = {
                count: statistics.fmean(run[name] for run in arms[arm])
                for count, name in names.items()
                if name in arms[arm][0]
            }
            width = 2.5 if arm.startswith("velocity") else 1.2
            axis.plot(
                means.keys(), means.values(), ".-", color=f"C{number}", label=arm, linewidth=width
            )
        axis.axvline(LOOPS, color="0.7", linestyle=":")
        title = textwrap.fill(shape, 60)
        axis.set(xscale="log", title=title, xlabel="repetitions", ylabel=measure)
        axis.title.set_fontsize(8)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[0, -1].legend(fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def any_time(rows):
    """The tables as Markdown, with the runs behind them."""
    return "\n".join([*curves(known_of(rows)), "", made_by(rows)]) if rows else ""
