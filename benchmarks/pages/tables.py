"""Write the tables of README.md and of two pages of docs/ from the rows in this folder.

    python -m benchmarks.pages.tables            # all *.csv beside this file
    python -m benchmarks.pages.tables --check    # exit status 1 if a page is out of date

Of rows that differ in date, commit and value only, the last one counts. A table is a command on a
machine: numbers of two machines or two runs never stand side by side. The exception are the benches
in `SERIES`, whose every case is a run of its own, of an hour: each line names its commit.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.common.results import read_rows
from benchmarks.pages import dynamics_page, ops_table, recipe_page
from benchmarks.robustness import promises_page

HERE = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEYS = ("case", "shape", "dtype", "backend")
MACHINE = ("command", "hardware", "threads", "torch", "triton", "python")
RUN = (*MACHINE, "commit", "date")
SERIES = {"recipe", "sampler"}


def shown(text):
    """A whole number whole, any other with four digits; other text as it is."""
    if text.isdecimal():
        return f"{int(text):,}"
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def lines_of(rows):
    """Lines of Markdown: a line a case, a column a metric."""
    metrics = list(dict.fromkeys((row["metric"], row["unit"]) for row in rows))
    series = rows[0]["bench"] in SERIES
    keys = [key for key in KEYS if any(row[key] for row in rows)] + ["commit"] * series
    heads = [
        f"{metric} [{unit}]" if unit not in ("", metric) else metric for metric, unit in metrics
    ]
    values = {}
    for row in rows:
        line = values.setdefault(tuple(row[key] for key in keys), {})
        line[row["metric"], row["unit"]] = shown(row["value"])
    lines = ["| " + " | ".join([*keys, *heads]) + " |"]
    lines.append("|" + " --- |" * len(keys) + " ---: |" * len(heads))
    for key, line in values.items():
        cells = [*key, *(line.get(metric, "") for metric in metrics)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(rows):
    """Markdown: the table, with the run underneath."""
    run = rows[-1]
    lines = ops_table.table(rows) if run["bench"] == "ops" else lines_of(rows)
    when = "" if run["bench"] in SERIES else f", commit {run['commit']}, {run['date']}"
    about = (
        f"`{run['command']}`{when}: {run['hardware']}, "
        f"{run['threads']} threads, torch {run['torch']}, triton {run['triton'] or 'none'}, "
        f"Python {run['python']}."
    )
    return "\n".join(lines) + f"\n\n{about}\n"


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
    for run, found in last.values():
        same = run[: len(MACHINE)] if found[0]["bench"] in SERIES else run
        grouped.setdefault(same, []).extend(found)
    return "\n".join(map(table, grouped.values())) if grouped else "No rows yet.\n"


def rewritten(document, rows):
    """The document with what stands between its marks replaced."""

    def one(match):
        bench = match[2]
        return f"{match[1]}\n{tables([r for r in rows if r['bench'] == bench])}\n{match[3]}"

    return MARKED.sub(one, document)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    rows = [row for path in sorted(HERE.glob("*.csv")) for row in read_rows(path)]
    stale = []
    for page in (HERE / "README.md", dynamics_page.PAGE, promises_page.PAGE):
        before = page.read_text()
        after = rewritten(before, rows)
        for part in (dynamics_page, promises_page, recipe_page):
            after = part.rewritten(after, rows)
        if after == before:
            continue
        stale.append(page)
        if not options.check:
            page.write_text(after)
    names = ", ".join(str(page.relative_to(HERE.parent)) for page in stale)
    if options.check:
        print(
            f"out of date, run python -m benchmarks.pages.tables: {names}"
            if stale
            else "up to date"
        )
        return int(bool(stale))
    print(f"wrote {names}" if stale else "nothing to write: up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
