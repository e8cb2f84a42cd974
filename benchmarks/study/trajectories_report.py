"""Table of the rows of `trajectories`; imports no network."""

from benchmarks.common.results import made_by
from benchmarks.study.loops_report import mean_and_error
from benchmarks.theory.physics_report import known_of

TASKS = ("arm", "maze")
DECODERS = (
    "MLP", "transformer", "low-pass", "oscillators", "acceleration", "velocity", "no carry",
)  # fmt: skip
SHOWN = (
    "error, 64 steps", "error, 256 steps", "goal error", "jerk", "error, 256 steps, half dropped",
    "jerk, half dropped", "parameters",
)  # fmt: skip


def table(known):
    """Markdown lines: one per task and decoder, means and standard errors over seeds.

    Args:
        known: {"TASK / DECODER / seed S": {metric: value}}.
    """
    runs = {}
    for case, metrics in known.items():
        task, decoder, _ = case.split(" / ")
        runs.setdefault((task, decoder), []).append(metrics)
    lines = [
        "| task | decoder | " + " | ".join(SHOWN) + " | seeds |",
        "|---|---|" + "---:|" * (len(SHOWN) + 1),
    ]
    for task in TASKS:
        for decoder in DECODERS:
            if of := runs.get((task, decoder)):
                cells = [mean_and_error([run[name] for run in of]) for name in SHOWN[:-1]]
                cells += [f"{of[0]['parameters']:,.0f}", str(len(of))]
                lines.append(f"| {task} | {decoder} | " + " | ".join(cells) + " |")
    return lines


def trajectories(rows):
    """One table per amount of training as Markdown, with the run behind it."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of = [row for row in rows if row["shape"] == shape]
        lines += [*table(known_of(of)), "", f"{shape}. {made_by(of)}", ""]
    return "\n".join(lines[:-1])
