"""The report of a study: means, standard deviations, and paired differences with intervals.

Networks of one seed share initial weights and batches, so differences are taken per seed. The
interval is Student's: mean ± t(0.975, n - 1) · s / sqrt(n) over the n common seeds, which assumes
normal differences; one seed has no interval. There is no correction for multiple comparisons: of
twenty variants without effect one is expected to have an interval that excludes 0.

A comparison at equal time also depends on a measured ratio of step times, which all seeds share.
Its error is taken from variants that differ in settings and not in operations (`SAME_WORK`): the
standard deviation of the logarithms of their ratios. The difference is computed again at both ends
of the 95 % interval of the ratio, and that half width is added to that of the seeds in quadrature.
"""

import csv
import itertools
import json
import math
import re
import shlex
import statistics

import numpy as np
from benchmarks.common.fields import overridden
from benchmarks.common.results import made_by
from benchmarks.study.ablation_labs import LABS
from benchmarks.study.ablation_study import BASELINE, shape_of
from scipy import stats

LEVEL = 0.95
SAME_WORK = (
    "branch", "branch, no velocity clip", "branch, dt 1", "branch, zero spring",
    "branch, critically damped",
)  # fmt: skip
"""Variants whose steps cost the same; what their measured times differ by is error."""
HELDOUT = "held-out loss"
PAINTED = ("fid", "fd_random", "kid_mean")
# Tolerated relative difference in size between a variant and its plain network.
NEAR = {"lm": 0.005, "dit": 0.021}
CURVE = (
    "final training loss", "mean training loss", "detrended loss variance",
    "gradient norm, median", "gradient norm, 0.99", "gradient spikes",
    "turning over depth", "largest jump of a layer",
)  # fmt: skip
DRAWN = (
    BASELINE, "branch", "stream", "force", "force, MLP only", "force, MLP only, channel",
    "force, across layers only", "force, across blocks only",
)  # fmt: skip
"""The networks in the figure over depth; the CSV next to it has all of them."""


def interval(differences):
    """Mean and half width of the t-interval; the width is None for one value."""
    middle = statistics.fmean(differences)
    if len(differences) < 2:
        return middle, None
    quantile = stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1)
    return middle, quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def shown(differences, common=0.0):
    """Mean and interval as text; `common` is the half width of an error that all values share."""
    if not differences:
        return ""
    middle, half = interval(differences)
    if half is None:
        return f"{middle:+.4f}"
    half = math.hypot(half, common)
    return f"{middle:+.4f} [{middle - half:+.4f}, {middle + half:+.4f}]"


class Results:
    """Rows of a study that belong to its present settings.

    Attributes:
        values: {network: {metric: {seed: value}}}.
        ratio: {network: step time over that of the baseline}.
        rows: The rows. If they name several machines, a network and the plain one of the same seed
            may come from different machines.
        cells: (case, shape) of the runs.
    """

    def __init__(self, study, rows, overrides):
        self.study, lab = study, LABS[study.package]
        rows = [row for row in rows if row["bench"] == lab.bench]
        self.values, self.ratio, self.rows, self.cells = {}, {}, [], set()
        seeds = {int(s) for row in rows for s in re.findall(r"seed (\d+)", row["shape"])}
        shapes = {}
        for name, network in study.networks.items():
            for seed in seeds:
                config = study.config(lab, network, seed, "", overrides)
                shapes[name, shape_of(config, network)] = seed
        for row in rows:
            if row["metric"] == "step ratio":
                self.ratio[row["case"]] = float(row["value"])
            seed = shapes.get((row["case"], row["shape"]))
            if seed is not None:
                metrics = self.values.setdefault(row["case"], {})
                metrics.setdefault(row["metric"], {})[seed] = float(row["value"])
                self.rows.append(row)
                self.cells.add((row["case"], row["shape"]))

    def of(self, name, metric):
        """{seed: value}; empty if the metric was not measured."""
        return self.values.get(name, {}).get(metric, {})

    def size(self, name):
        return next(iter(self.of(name, "parameters").values()), None)

    def plain_of_equal_size(self, name):
        """The plain network nearest in size after as many steps, or None if none is near."""
        wanted = self.size(name)
        plain = [n.name for n in self.study.networks.values() if n.plain and n.longer == 1.0]
        gaps = {other: abs(self.size(other) / wanted - 1) for other in plain if self.size(other)}
        nearest = min(gaps, key=gaps.get, default=None)
        return nearest if nearest and gaps[nearest] <= NEAR[self.study.package] else None

    def plain_of_equal_time(self, name, seed, factor=1.0):
        """Held-out loss of the plain network at the time of a variant; None beyond its runs.

        With a `factor`, the ratio of the step times is another, but not beyond the runs.
        """
        ratio = self.ratio.get(name)
        points = sorted(
            (network.longer, self.of(network.name, HELDOUT)[seed])
            for network in self.study.networks.values()
            if network.plain
            and network.fields == self.study.networks[BASELINE].fields
            and seed in self.of(network.name, HELDOUT)
        )
        if ratio is None or not points or points[0][0] != 1.0 or ratio > points[-1][0]:
            return None
        factors, losses = zip(*points, strict=True)
        # A variant that measures slightly faster than the plain network is compared at equal steps.
        return float(np.interp(math.log(max(ratio * factor, 1.0)), np.log(factors), losses))

    def differences(self, name, metric, other):
        """The value of the variant minus that of the other network, over common seeds."""
        own, base = self.of(name, metric), self.of(other, metric) if other else {}
        return [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]

    def differences_at_equal_time(self, name, factor=1.0):
        pairs = [
            (v, self.plain_of_equal_time(name, s, factor))
            for s, v in self.of(name, HELDOUT).items()
        ]
        return [mine - plain for mine, plain in pairs if plain is not None]

    def ratio_error(self):
        """Half width of the interval of the logarithm of a step ratio; 0 if it is not known."""
        logs = [math.log(self.ratio[name]) for name in SAME_WORK if name in self.ratio]
        if len(logs) < 2:
            return 0.0
        return stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1) * statistics.stdev(logs)

    def error_at_equal_time(self, name):
        """Half width of the mean difference at equal time that the error of the ratio makes."""
        middle, error = self.differences_at_equal_time(name), self.ratio_error()
        if not middle:
            return 0.0
        ends = (self.differences_at_equal_time(name, math.exp(x)) for x in (-error, error))
        return max(abs(statistics.fmean(end) - statistics.fmean(middle)) for end in ends)


def spread(values):
    if not values:
        return ""
    middle = statistics.fmean(values)
    return f"{middle:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def main_table(results):
    lines = [
        f"| network | seeds | parameters [x {BASELINE}] | step [x {BASELINE}] | {HELDOUT} "
        f"| − {BASELINE} | − equal parameters | − equal time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = results.size(BASELINE)
    for name, network in results.study.networks.items():
        losses = list(results.of(name, HELDOUT).values())
        ended = results.of(name, "diverged")
        if not losses and not ended:
            continue
        cells = [name, str(len(losses) + len(ended))]
        cells.append(f"{results.size(name) / base:.3f}" if losses else "")
        ratio = results.ratio.get(name)
        cells.append(f"{ratio:.3f}" if ratio and network.longer == 1.0 else "")
        cells.append(spread(losses) + (f" ({len(ended)} diverged)" if ended else ""))
        apart = name != BASELINE
        cells.append(shown(results.differences(name, HELDOUT, BASELINE)) if apart else "")
        if network.plain or not losses:
            cells += ["", ""]
        else:
            same = results.plain_of_equal_size(name)
            cells.append(shown(results.differences(name, HELDOUT, same)))
            common = results.error_at_equal_time(name)
            cells.append(shown(results.differences_at_equal_time(name), common))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def curve_table(results):
    """Metrics of curves and depth: means, and differences to the baseline."""
    named = [m for m in CURVE if any(results.of(n, m) for n in results.study.networks)]
    extra = sorted({m for v in results.values.values() for m in v if m.startswith(PAINTED)})
    lines = [
        "| network | " + " | ".join([*named, *extra]) + " |",
        "|---|" + "---:|" * len(named + extra),
    ]
    for name in results.study.networks:
        if not results.of(name, HELDOUT):
            continue
        cells = []
        for metric in named + extra:
            found = list(results.of(name, metric).values())
            mean = f"{statistics.fmean(found):.4g}" if found else ""
            apart = results.differences(name, metric, BASELINE) if name != BASELINE else []
            cells.append(mean + (f" ({shown(apart)})" if apart else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def text(results):
    """Both tables and their origin as Markdown."""
    corpus = results.rows[-1]["shape"].partition(",")[0]
    about = (
        f"{made_by(results.rows)} Trained on {corpus}. In brackets: {LEVEL:.0%} t-intervals of the "
        "differences paired by seed; at equal time with the error of the step ratio, "
        f"± {math.expm1(results.ratio_error()):.0%}."
    )
    return "\n".join([*main_table(results), "", *curve_table(results), "", about])


def of_all_commands(study, rows):
    """The tables of every `ablate run` in the rows as Markdown.

    Rows are grouped by command and corpus: overrides are part of a cell's settings, and losses on
    two corpora are not comparable. Rows with settings that the study no longer has are counted.
    """
    of = [row for row in rows if row["bench"] == LABS[study.package].bench]
    groups = {}
    for row in of:
        if row["metric"] not in ("step", "step ratio"):
            corpus = row["shape"].partition(",")[0]
            groups.setdefault((row["command"], corpus), set()).add((row["case"], row["shape"]))
    parts = []
    for (command, corpus), cells in groups.items():
        # The name of the corpus stands for its path, which the rows do not have.
        overrides = overrides_of(command) | {"data.source": corpus}
        results = Results(study, of, overrides)
        lost = len(cells) - len(results.cells & cells)
        if results.of(BASELINE, HELDOUT):
            parts.append(text(results))
        else:
            lost = len(cells)
        if lost:
            parts.append(
                f"{lost} run{'s' * (lost > 1)} of `{command}` on {corpus} had settings that "
                f"configs/ablations/{study.name}.yaml and the trainers' defaults do not have now, "
                "or no plain network to be compared with: not shown."
            )
    return "\n\n".join(parts) or "No rows yet."


def overrides_of(command):
    """{field: value} of the `--override` of a recorded command."""
    words = shlex.split(command)
    if "--override" not in words:
        return {}
    given = words[words.index("--override") + 1 :]
    return overridden(itertools.takewhile(lambda word: word[:2] != "--", given))


def profiles(study, runs):
    """Values over depth of all cells in a folder: (network, seed, place, metric, value)."""
    rows = []
    for path in sorted(runs.glob("*/seed-*/cell.json")):
        cell = json.loads(path.read_text())
        seed = int(path.parent.name.removeprefix("seed-"))
        if cell["case"] not in study.networks:
            continue
        for index, value in enumerate(cell["profile"].get("activation_rms", [])):
            rows.append((cell["case"], seed, f"layer {index}", "activation rms", value))
        for module in cell["profile"].get("dynamics", []):
            place = module.pop("layer")
            rows += [(cell["case"], seed, place, metric, v) for metric, v in module.items()]
    return rows


def write_profiles(study, runs, folder):
    """Write `<study>-depth.csv` and its figure, with one panel per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = profiles(study, runs)
    with (folder / f"{study.name}-depth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("network", "seed", "place", "metric", "value"))
        writer.writerows((*row[:-1], f"{row[-1]:.5g}") for row in rows)
    shown_metrics = ("activation rms", "alpha_mean", "beta_mean", "gate_mean", "velocity_rms")
    figure, axes = plt.subplots(1, 5, figsize=(17, 4.5), constrained_layout=True)
    for axis, metric in zip(axes, shown_metrics, strict=True):
        lines = {}
        for name, seed, _, kind, value in rows:
            if kind == metric and name in DRAWN:
                lines.setdefault((name, seed), []).append(value)
        for name in dict.fromkeys(name for name, _ in lines):
            of_seeds = [line for (n, _), line in lines.items() if n == name]
            axis.plot(np.mean(of_seeds, axis=0), color=f"C{DRAWN.index(name)}", label=name)
        axis.set(title=metric.replace("_", " "), xlabel="module, in the order of depth")
        if metric == "activation rms" and all(v > 0 for line in lines.values() for v in line):
            axis.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=7)
    figure.savefig(folder / f"{study.name}-depth.png", dpi=100)


def write_differences(results, folder):
    """Write `<study>.png`: held-out loss minus that of the plain network at equal time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {
        name: differences
        for name, network in results.study.networks.items()
        if not network.plain and (differences := results.differences_at_equal_time(name))
    }
    figure, axis = plt.subplots(figsize=(7, 1 + 0.28 * len(found)), constrained_layout=True)
    for place, (name, differences) in enumerate(found.items()):
        middle, half = interval(differences)
        half = half and math.hypot(half, results.error_at_equal_time(name))
        axis.plot(differences, [place] * len(differences), ".", color="0.6", markersize=4)
        axis.errorbar(middle, place, xerr=half, fmt="o", color="tab:blue", markersize=4)
    axis.axvline(0, color="0.7", linewidth=0.8)
    axis.set_yticks(range(len(found)), list(found), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(f"{HELDOUT} minus the plain network's at equal time (left is better)")
    figure.savefig(folder / f"{results.study.name}.png", dpi=110)


def report(study, rows, options, overrides):
    """Print the tables; with `--into` write the figures of the study into that folder."""
    results = Results(study, rows, overrides)
    if not results.of(BASELINE, HELDOUT):
        raise ValueError(f"no rows of {BASELINE} for this study as it is now: run it first")
    print(text(results))
    if options.into is None:
        return
    options.into.mkdir(parents=True, exist_ok=True)
    write_differences(results, options.into)
    if options.runs:
        write_profiles(study, options.runs, options.into)
