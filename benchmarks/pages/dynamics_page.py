"""The tables of docs/results/dynamics.md that come from rows, each between its marks.

`tables.py` writes them. A part without rows says so in a line.
"""

import re
from pathlib import Path

from benchmarks.study.claims_report import claims
from benchmarks.theory.physics_report import closed_loop, rollouts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/results/dynamics.md"
MARKED = re.compile(
    r"(<!-- (cost|placements|physics|closed loop|claims|ablate: \w+) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
EMPTY = "No rows yet."


def ablation(name, rows):
    """The tables of a study; what reads a study is imported for rows alone, it takes seconds."""
    rows = [row for row in rows if row["bench"] == f"ablate_{name}"]
    if not rows:
        return EMPTY
    from benchmarks.study.ablation_report import of_all_commands
    from benchmarks.study.ablation_study import read_study

    return of_all_commands(read_study(ROOT / f"configs/ablations/{name}.yaml"), rows)


def cost(rows):
    """A table: steps of a compiled stack of blocks over those of the same stack without dynamics.

    The last row counts where a machine measured a stack more than once.
    """
    found = {}
    for row in rows:
        case, size = row["case"].split(), row["shape"].split()[0]
        if case[:2] == ["stack", "compiled"] and row["backend"] == "auto":
            stack = found.setdefault((row["hardware"], size, row["dtype"]), {})
            stack.setdefault(case[2], {})[row["metric"]] = float(row["value"])
    if not found:
        return []
    lines = ["| machine | stack | coefficients | step [× none] | parameters [× none] |"]
    lines.append("| --- | --- | --- | ---: | ---: |")
    for where, kinds in found.items():
        for kind, value in kinds.items():
            about = f"| {where[0]} | {where[1]}, {where[2]} | `{kind}` |"
            lines.append(f"{about} {value['ratio']:.3f} | {value['parameters']:.3f} |")
    return lines


def placements(rows):
    """A table: step, memory and parameters of both models with dynamics over those without."""
    found = {}
    for row in rows:
        network, _, mode = row["case"].partition(", ")
        if mode == "compiled":
            model, _, dynamics = network.partition(" ")
            about = (row["hardware"], f"{model}, {row['shape']}", dynamics)
            found.setdefault(about, {})[row["metric"]] = float(row["value"])
    if not found:
        return []
    lines = [
        "| machine | model | dynamics | step [× none] | memory of a step [× none] "
        "| parameters [× none] |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for (machine, model, dynamics), value in found.items():
        if dynamics != "none":
            cells = (value[name] for name in ("ratio", "memory ratio", "parameter ratio"))
            numbers = " | ".join(f"{cell:.3f}" for cell in cells)
            lines.append(f"| {machine} | {model} | `{dynamics}` | {numbers} |")
    return lines


def part(name, rows):
    """What belongs behind a mark, Markdown."""
    if name.startswith("ablate: "):
        return ablation(name.removeprefix("ablate: "), rows)
    bench, write = {
        "cost": ("tax", cost),
        "placements": ("placements", placements),
        "physics": ("physics", rollouts),
        "closed loop": ("closed_loop", closed_loop),
        "claims": ("claims_dit", claims),
    }[name]
    return "\n".join(write([row for row in rows if row["bench"] == bench])) or EMPTY


def rewritten(document, rows):
    """The page with what stands between its marks replaced."""
    return MARKED.sub(lambda m: f"{m[1]}\n{part(m[2], rows)}\n\n{m[3]}", document)
