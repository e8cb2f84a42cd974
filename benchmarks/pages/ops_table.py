"""The tables of `bench_ops.py`: the implementations of each operation side by side.

Where a run has both, `time` (of calls from Python) and `device time` (of the same calls in a CUDA
graph) share a cell.

A test compares `choices` with the table `AUTO` of `inl_core.ops`.
"""

COLUMNS = {
    "eager": "eager", "mask loop": "eager", "dense": "eager",
    "compile": "compiled", "dense compile": "compiled",
    "triton": "Triton",
    "F.rms_norm": "library", "liger": "library", "grouped_mm": "library",
}  # fmt: skip
"""The column of each implementation."""


def _line(row):
    """(operation and pass, shape); the dense MLP as wide as one expert is a separate operation."""
    case = row["case"]
    if row["backend"].startswith("dense"):
        case = case.replace("routed_mlp", "dense_mlp")
    return case, row["shape"]


def times(rows, metric="time"):
    """{(case, shape): {column: (ms, implementation)}}; of two libraries the faster one."""
    found = {}
    for row in rows:
        if row["metric"] == metric:
            line, column = found.setdefault(_line(row), {}), COLUMNS[row["backend"]]
            ms = float(row["value"]), row["backend"]
            line[column] = min(ms, line.get(column, ms))
    return found


def totals(rows, metric="time"):
    """{operation with a kernel: {column: ms}}: both passes, all its cases and sizes together."""
    found = {}
    for (case, _), line in times(rows, metric).items():
        own = found.setdefault(case.split()[0], {})
        for column, (ms, _) in line.items():
            own[column] = own.get(column, 0.0) + ms
    return {name: line for name, line in found.items() if "Triton" in line}


def choices(rows):
    """{operation: (eager, compiled)}, "triton" where the kernel won in the last run with kernels.

    Eager the rival is the definition, compiled the compiled definition by the device time where it
    was measured: a compiled step launches without the Python of each operation. The routed MLP is
    not compiled from its definition: there it is compared with torch's grouped product.
    """
    runs = {}
    for row in rows:
        if row["bench"] == "ops":
            runs.setdefault((row["command"], row["hardware"], row["commit"]), []).append(row)
    last = next(filter(totals, reversed(runs.values())), [])
    called, replayed = totals(last), totals(last, "device time")

    def choice(line, *rivals):
        rival = next(line[column] for column in rivals if column in line)
        return "triton" if line["Triton"] <= rival else "reference"

    return {
        name: (choice(line, "eager"), choice(replayed.get(name, line), "compiled", "library"))
        for name, line in called.items()
    }


def _row(*cells):
    return "| " + " | ".join(cells) + " |"


def _head(words, numbers):
    return [_row(*words, *numbers), "|" + " --- |" * len(words) + " ---: |" * len(numbers)]


def _cell(found, column, form):
    """The values of a column in several {column: value}, written by `form`."""
    return " / ".join(form(line[column]) for line in found if column in line)


def table(rows):
    """Lines of Markdown: every pass of every operation, then the totals per operation."""
    columns = ("eager", "compiled", "Triton")
    metrics = [m for m in ("time", "device time") if any(row["metric"] == m for row in rows)]
    measured = [times(rows, metric) for metric in metrics]
    both = ", called from Python / replayed from a CUDA graph" if len(metrics) > 1 else ""
    limits = ", ".join(
        f"{row['case']} {float(row['value']):.4g} {row['unit']}"
        for row in rows
        if row["case"] in ("copy", "matmul")
    )
    lines = [
        f"Here: {limits}. Milliseconds in {rows[-1]['dtype']}{both}:\n",
        *_head(("operation", "shape"), (*columns, "library", "Triton reaches")),
    ]
    shares = {
        _line(row): f"{float(row['value']):.2f} {row['metric']}"
        for row in rows
        if row["metric"].startswith("of ") and row["backend"] == "triton"
    }
    for where in measured[0]:
        found = [each.get(where, {}) for each in measured]
        cells = [_cell(found, column, lambda one: f"{one[0]:.4g}") for column in columns]
        library = _cell(found, "library", lambda one: "{:.4g} {}".format(*one))
        lines.append(_row(*where, *cells, library, shares.get(where, "")))
    whole = [totals(rows, metric) for metric in metrics]
    if whole[0]:
        lines.append("\nAll lines of an operation together, in times of its kernel:\n")
        others = ("eager", "compiled", "library")
        lines += _head(["operation"], others)
        for name in whole[0]:
            found = [each.get(name, {}) for each in whole]
            ratios = [{c: line[c] / line["Triton"] for c in line} for line in found]
            lines.append(_row(name, *(_cell(ratios, c, "{:.2f}".format) for c in others)))
    return lines
