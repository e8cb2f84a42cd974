"""Write the tables of docs/results/ from the rows of benchmarks/results.csv.

    python -m benchmarks.pages.tables            # rewrite the pages that are out of date
    python -m benchmarks.pages.tables --check    # write nothing, exit with 1 if a page is stale

A page is text with marks; what stands between `<!-- table: NAME -->` and `<!-- end -->` is
generated. NAME is a key of `WRITERS` or the name of a bench, which gets the plain tables: one per
command and machine, so that numbers of two machines or two runs are never side by side. Words after
the name of a bench choose the runs whose command has them (`bench_dit prompts`). The benches in
`SERIES` are the exception: each of their cases is a run of an hour of its own, and each line names
its commit. Of rows that differ in date, commit and value only, the last one counts.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.common.results import current_command, read_rows
from benchmarks.pages import ops_table, recipe_page
from benchmarks.study.any_time_report import any_time
from benchmarks.study.claims_report import claims
from benchmarks.study.loops_report import loops
from benchmarks.study.trajectories_report import trajectories
from benchmarks.theory.physics_report import closed_loop, rollouts

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/results"
MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
EMPTY = "No rows yet."
KEYS = ("case", "shape", "dtype", "backend")
MACHINE = ("command", "hardware", "threads", "torch", "triton", "python")
RUN = (*MACHINE, "commit", "date")
SERIES = {"recipe", "sampler"}


def format_value(text):
    """A whole number in full, any other number with four digits, other text as it is."""
    if text.isdecimal():
        return f"{int(text):,}"
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def lines_of(rows):
    """Markdown lines with one line per case and one column per metric."""
    metrics = list(dict.fromkeys((row["metric"], row["unit"]) for row in rows))
    keys = [key for key in KEYS if any(row[key] for row in rows)]
    keys += ["commit"] * (rows[0]["bench"] in SERIES)
    heads = [
        f"{metric} [{unit}]" if unit not in ("", metric) else metric for metric, unit in metrics
    ]
    values = {}
    for row in rows:
        line = values.setdefault(tuple(row[key] for key in keys), {})
        line[row["metric"], row["unit"]] = format_value(row["value"])
    lines = ["| " + " | ".join([*keys, *heads]) + " |"]
    lines.append("|" + " --- |" * len(keys) + " ---: |" * len(heads))
    for key, line in values.items():
        cells = [*key, *(line.get(metric, "") for metric in metrics)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(rows):
    """One table in Markdown, followed by the run behind it."""
    run = rows[-1]
    lines = ops_table.table(rows) if run["bench"] == "ops" else lines_of(rows)
    when = "" if run["bench"] in SERIES else f", commit {run['commit']}, {run['date']}"
    about = (
        f"`{run['command']}`{when}: {run['hardware']}, "
        f"{run['threads']} threads, torch {run['torch']}, triton {run['triton'] or 'none'}, "
        f"Python {run['python']}."
    )
    return "\n".join(lines) + f"\n\n{about}"


def tables(rows):
    """The tables of one bench: the last run of every command (and case) on every machine."""
    last = {}
    for row in rows:
        case = tuple(row[key] for key in KEYS) if row["bench"] in SERIES else ()
        where = (row["command"], row["hardware"], case)
        run = tuple(row[name] for name in RUN)
        if last.get(where, (None, []))[0] != run:
            last[where] = (run, [])
        last[where][1].append(row)
    grouped = {}
    for run, of_run in last.values():
        same = run[: len(MACHINE)] if of_run[0]["bench"] in SERIES else run
        grouped.setdefault(same, []).extend(of_run)
    return "\n\n".join(map(table, grouped.values()))


def ablation(rows):
    """The tables of a study. Reading a study imports both packages, so it is done for rows only."""
    if not rows:
        return ""
    from benchmarks.study.ablation_report import of_all_commands
    from benchmarks.study.ablation_study import read_study

    name = rows[0]["bench"].removeprefix("ablate_")
    return of_all_commands(read_study(ROOT / f"configs/ablations/{name}.yaml"), rows)


WRITERS = {
    "physics": rollouts,
    "closed_loop": closed_loop,
    "loops": loops,
    "any_time_lm": any_time,
    "trajectories": trajectories,
    "claims_dit": claims,
    "ablate_lm": ablation,
    "ablate_dit": ablation,
}
"""Benches whose tables are not the plain ones."""


def write(name, rows):
    """The Markdown that belongs behind the mark NAME; `rows` are those of all benches."""
    if name == "recipe ratios":
        return recipe_page.ratios(rows) or EMPTY
    if name == "recipe missing":
        return recipe_page.missing(rows)
    bench, _, words = name.partition(" ")
    chosen = [row for row in rows if row["bench"] == bench and words in row["command"]]
    return WRITERS.get(bench, tables)(chosen) or EMPTY


def rewritten(page, rows):
    """The text of a page with everything between its marks replaced."""
    return MARKED.sub(lambda mark: f"{mark[1]}\n{write(mark[2], rows)}\n\n{mark[3]}", page)


def main():
    """Write or check all pages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    rows = read_rows(ROOT / "benchmarks/results.csv")
    rows = [row | {"command": current_command(row["command"])} for row in rows]
    stale = []
    for page in sorted(PAGES.rglob("*.md")):
        before = page.read_text()
        after = rewritten(before, rows)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not options.check:
                page.write_text(after)
    if not stale:
        print("up to date")
    elif options.check:
        print(f"out of date, run python -m benchmarks.pages.tables: {', '.join(stale)}")
    else:
        print(f"wrote {', '.join(stale)}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
