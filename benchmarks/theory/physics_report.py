"""Tables of the rows of `physics` and `closed_loop`; imports no network."""

import math
import statistics

from benchmarks.common.results import made_by
from scipy import stats

STEPS = (1, 16, 64)
# Each placement with the plain network of equal parameters.
BASELINES = {
    "stream": "none",
    "branch": "none",
    "force": "none, wider",
    "force, no-carry": "none, wider",
    "force_mlp": "none",
    "force_mlp, channel": "none, narrower",
}
# The effect of the carried velocity alone: the same layer with and without it.
MEMORY = ("force", "force, no-carry")


def ratio_interval(ratios):
    """Geometric mean of paired ratios and the ends of its 95 % t-interval; None for one ratio."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), None, None
    half = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def table(known, tasks, seeds):
    """Markdown lines: rollout error over that of the plain network, mean and interval over seeds.

    Args:
        known: {"TASK / NETWORK / seed S": {metric: value}}.
        tasks: Names of the systems.
        seeds: Seeds; a ratio is taken where both networks have the seed.
    """
    heads = [f"{steps} step{'s' * (steps > 1)} ahead" for steps in STEPS]
    lines = [
        "| system | placement | " + " | ".join(heads) + " | seeds |",
        "|---|---|" + "---:|" * (len(STEPS) + 1),
    ]
    for task in tasks:
        for placement, baseline in (*BASELINES.items(), MEMORY):
            pairs = [
                (known[own], known[base])
                for seed in seeds
                if (own := f"{task} / {placement} / seed {seed}") in known
                and (base := f"{task} / {baseline} / seed {seed}") in known
            ]
            if not pairs:
                continue
            cells = []
            for steps in STEPS:
                metric = f"rollout error, {steps} steps"
                middle, low, high = ratio_interval([a[metric] / b[metric] for a, b in pairs])
                cells.append(f"{middle:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low else ""))
            name = f"{placement} over {baseline}" if (placement, baseline) == MEMORY else placement
            lines.append(f"| {task} | {name} | " + " | ".join([*cells, str(len(pairs))]) + " |")
    return lines


def known_of(rows):
    """{case: {metric: value}} of rows; of repeated rows the last counts."""
    known = {}
    for row in rows:
        known.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    return known


def rollouts(rows):
    """One table per amount of training as Markdown."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of = [row for row in rows if row["shape"] == shape]
        known = known_of(of)
        names = [case.split(" / ") for case in known]
        tasks = dict.fromkeys(name[0] for name in names)
        seeds = sorted({int(name[2].removeprefix("seed ")) for name in names})
        lines += [*table(known, tasks, seeds), "", f"Trajectories {shape}. {made_by(of)}", ""]
    return "\n".join(lines[:-1])


def closed_loop(rows):
    """One line per policy and kind of payload as Markdown: medians and ranges over seeds."""
    lines = []
    for command in dict.fromkeys(row["command"] for row in rows):
        of = [row for row in rows if row["command"] == command]
        metrics = list(dict.fromkeys((row["metric"], row["unit"]) for row in of))
        heads = [f"{metric} [{unit}]" if unit else metric for metric, unit in metrics]
        lines += [
            "| policy, tried on | " + " | ".join(heads) + " | seeds |",
            "|---|" + "---:|" * (len(metrics) + 1),
        ]
        for case in dict.fromkeys(row["case"] for row in of):
            cells, counts = [], set()
            for metric, _ in metrics:
                # By shape, which names the seed: a repeated run counts once.
                values = list(
                    {
                        row["shape"]: float(row["value"])
                        for row in of
                        if (row["case"], row["metric"]) == (case, metric)
                    }.values()
                )
                counts.add(len(values))
                spread = f" [{min(values):.4g}, {max(values):.4g}]" if len(values) > 1 else ""
                cells.append(f"{statistics.median(values):.4g}{spread}")
            lines.append(f"| {case} | " + " | ".join([*cells, str(max(counts))]) + " |")
        lines += [
            "",
            f"Medians over seeds, with smallest and largest in brackets. {made_by(of)}",
            "",
        ]
    return "\n".join(lines[:-1])
