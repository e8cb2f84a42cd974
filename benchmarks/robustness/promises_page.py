"""The totals and the fuzzing of docs/promises.md, from rows and from the log of the fuzzing.

`tables.py` writes them. The rows are those of `promise_counts.py`, `soak.py` and `load_gallery.py`;
the first and the last write none if anything is not as promised, so what they count went well.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/promises.md"
LOG = ROOT / "docs/results/fuzz.jsonl"
MARKED = re.compile(r"(<!-- promises: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

FAULTS = (
    "Crash and power loss", "Full and failing disks", "Damaged files", "Concurrent use",
    "Lost processes",
)  # fmt: skip
INPUTS = ("Hostile input",)
"""Sections of the page whose tests are counted."""


def last_run(rows, bench):
    """Value by (case, metric) of a bench's last run, and the commit."""
    mine = [row for row in rows if row["bench"] == bench]
    if not mine:
        return {}, ""
    run = [mine[-1][key] for key in ("command", "hardware", "commit", "date")]
    found = {}
    for row in mine:
        if [row[key] for key in ("command", "hardware", "commit", "date")] == run:
            found[row["case"], row["metric"]] = int(float(row["value"]))
    return found, mine[-1]["commit"]


def parsers(text):
    """The last line of each parser."""
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["parser"]: line for line in lines}


def counted(rows, log):
    """A line a run: what ran, faults, inputs, lost, corrupted, hangs."""
    lines = []
    tests, commit = last_run(rows, "promises")
    for section in (*FAULTS, *INPUTS):
        if (section, "injected") in tests:
            number, cases = tests[section, "injected"], tests[section, "tests"]
            faults, inputs = (number, 0) if section in FAULTS else (0, number)
            what = f"the {cases} tests of “{section}”, commit {commit}"
            lines.append((what, faults, inputs, 0, 0, 0))
    soak, commit = last_run(rows, "soak")
    soak = {metric: value for (_, metric), value in soak.items()}
    if soak:
        what = f"the soak, {soak['rounds']} rounds, commit {commit}"
        lost, other = soak["rounds failed"], soak["rounds with other bits"]
        lines.append((what, soak["kills"], 0, lost, other, 0))
    load, commit = last_run(rows, "load_gallery")
    load = {metric: value for (_, metric), value in load.items()}
    if load:
        what = f"the gallery under load, {load['asked']} paintings asked for, commit {commit}"
        faults = load["left in the middle"] + load["stopped while waiting"]
        wrong = load["of another page"] + load["other bits"] + load["batch other bits"]
        lines.append((what, faults, load["refused"], load["not painted"], wrong, 0))
    if log:
        inputs = sum(line["executions"] for line in log.values())
        lines.append((f"fuzzing, {len(log)} parsers", 0, inputs, 0, 0, 0))
    return lines


def totals(rows, log):
    """Markdown: a line a run, and the sums."""
    lines = counted(rows, log)
    if not lines:
        return "No rows yet."
    sums = [sum(column) for column in list(zip(*lines, strict=True))[1:]]
    heads = ["faults injected", "bad inputs tried", "runs lost", "silent corruptions", "hangs"]
    text = ["| what ran | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for what, *numbers in (*lines, ("**all**", *sums)):
        cells = [f"{n:,}" if n or i > 1 else "" for i, n in enumerate(numbers)]
        text.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def fuzzing(log):
    """Markdown: a line a parser."""
    if not log:
        return "No rows yet."
    heads = ["seconds", "inputs", "gave a value", "kinds of ends", "slowest [s]", "lines reached"]
    text = [f"| parser | {' | '.join(heads)} | commit |", "| --- |" + " ---: |" * 6 + " --- |"]
    for name, line in sorted(log.items()):
        cells = [f"{line[key]:,}" for key in ("executions", "values", "outcomes")]
        reached = f"{line['covered']} of {line['lines']}"
        text.append(
            f"| {name.replace('_', ' ')} | {line['seconds']:.0f} | {' | '.join(cells)} | "
            f"{line['slowest']:.2f} | {reached} | {line['commit']} |"
        )
    return "\n".join(text)


def rewritten(document, rows, log=None):
    """The page with what stands between its marks replaced."""
    if log is None:
        log = parsers(LOG.read_text()) if LOG.exists() else {}

    def part(name):
        return totals(rows, log) if name == "totals" else fuzzing(log)

    return MARKED.sub(lambda m: f"{m[1]}\n{part(m[2])}\n\n{m[3]}", document)
