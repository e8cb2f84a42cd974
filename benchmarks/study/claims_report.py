"""Tables of the rows of `claims_dit`: one line per network, differences paired by seed."""

import re

from benchmarks.common.results import made_by
from benchmarks.study.ablation_report import shown, spread
from benchmarks.study.ablation_study import BASELINE

# Metrics that are not compared.
NOT_COMPARED = ("its standard error over pictures", "styles", "steps between")


def table(rows):
    """Markdown lines of one measure with one number of images and steps."""
    values = {}
    for row in rows:
        seed = int(re.match(r"seed (\d+)", row["shape"])[1])
        values.setdefault(row["case"], {}).setdefault(row["metric"], {})[seed] = float(row["value"])
    metrics = {r["metric"]: r["unit"] for r in rows if r["metric"] not in NOT_COMPARED}
    heads = [f"{metric} [{unit}]" if unit else metric for metric, unit in metrics.items()]
    lines = [
        "| network | seeds | " + " | ".join(f"{head} | − {BASELINE}" for head in heads) + " |",
        "|---|---:|" + "---:|" * (2 * len(metrics)),
    ]
    for case, found in values.items():
        cells = []
        for metric in metrics:
            own, plain = found.get(metric, {}), values.get(BASELINE, {}).get(metric, {})
            both = sorted(own.keys() & plain.keys()) if case != BASELINE else []
            cells += [spread(list(own.values())), shown([own[s] - plain[s] for s in both])]
        seeds = max(len(of_seed) for of_seed in found.values())
        lines.append(f"| {case} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def claims(rows):
    """The tables of all measures as Markdown."""
    lines = []
    amounts = dict.fromkeys((r["command"], r["shape"].partition(", ")[2]) for r in rows)
    for command, amount in amounts:
        of = [r for r in rows if (r["command"], r["shape"].partition(", ")[2]) == (command, amount)]
        lines += [*table(of), "", f"Of each: {amount}. {made_by(of)}", ""]
    return "\n".join(lines[:-1])
