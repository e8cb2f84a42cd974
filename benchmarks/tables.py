"""Write the tables of README.md from the rows of the CSV files in this folder.

    python benchmarks/tables.py            # all *.csv beside this file
    python benchmarks/tables.py --check    # exit status 1 if README.md is out of date

Of rows that differ in date, commit and value only, the last one counts. A table is a command on a
machine: numbers of two machines or two runs never stand side by side.
"""

import argparse
import re
import sys
from pathlib import Path

from results import read_rows

HERE = Path(__file__).parent
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEYS = ("case", "shape", "dtype", "backend")
RUN = ("command", "hardware", "threads", "torch", "triton", "python", "commit", "date")


def shown(text):
    """A whole number whole, any other with four digits; other text as it is."""
    if text.isdecimal():
        return f"{int(text):,}"
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def table(rows):
    """Markdown: a line a case, a column a metric, with the run underneath."""
    metrics = list(dict.fromkeys((row["metric"], row["unit"]) for row in rows))
    keys = [key for key in KEYS if any(row[key] for row in rows)]
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
    run = rows[-1]
    about = (
        f"`{run['command']}`, commit {run['commit']}, {run['date']}: {run['hardware']}, "
        f"{run['threads']} threads, torch {run['torch']}, triton {run['triton'] or 'none'}, "
        f"Python {run['python']}."
    )
    return "\n".join(lines) + f"\n\n{about}\n"


def tables(rows):
    """The tables of one bench: the last run of every command on every machine."""
    last = {}
    for row in rows:
        where = (row["command"], row["hardware"])
        run = tuple(row[name] for name in RUN)
        if last.get(where, (None, []))[0] != run:
            last[where] = (run, [])
        last[where][1].append(row)
    return "\n".join(table(found) for _, found in last.values()) if last else "No rows yet.\n"


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
    readme = HERE / "README.md"
    before = readme.read_text()
    after = rewritten(before, [r for path in sorted(HERE.glob("*.csv")) for r in read_rows(path)])
    if options.check:
        print("up to date" if after == before else "out of date: python benchmarks/tables.py")
        return int(after != before)
    readme.write_text(after)
    print(f"wrote {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
