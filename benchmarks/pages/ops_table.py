"""The tables of `bench_ops.py`: the implementations of each operation side by side.

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


def times(rows):
    """{(case, shape): {column: (ms, implementation)}}; of two libraries the faster one."""
    found = {}
    for row in rows:
        if row["metric"] == "time":
            line, column = found.setdefault(_line(row), {}), COLUMNS[row["backend"]]
            ms = float(row["value"]), row["backend"]
            line[column] = min(ms, line.get(column, ms))
    return found


def totals(rows):
    """{operation with a kernel: {column: ms}}: both passes, all its cases and sizes together."""
    found = {}
    for (case, _), line in times(rows).items():
        own = found.setdefault(case.split()[0], {})
        for column, (ms, _) in line.items():
            own[column] = own.get(column, 0.0) + ms
    return {name: line for name, line in found.items() if "Triton" in line}


def choices(rows):
    """{operation: (eager, compiled)}, "triton" where the kernel won in the last run with kernels.

    Eager the rival is the definition, compiled the compiled definition. The routed MLP is not
    compiled from its definition: there it is compared with torch's grouped product.
    """
    runs = {}
    for row in rows:
        if row["bench"] == "ops":
            runs.setdefault((row["command"], row["hardware"], row["commit"]), []).append(row)
    last = next(filter(None, map(totals, reversed(runs.values()))), {})
    return {
        name: tuple(
            "triton" if line["Triton"] <= rival else "reference"
            for rival in (line["eager"], line.get("compiled", line.get("library")))
        )
        for name, line in last.items()
    }


def _row(*cells):
    return "| " + " | ".join(cells) + " |"


def _head(words, numbers):
    return [_row(*words, *numbers), "|" + " --- |" * len(words) + " ---: |" * len(numbers)]


def table(rows):
    """Lines of Markdown: every pass of every operation, then the totals per operation."""
    columns = ("eager", "compiled", "Triton")
    limits = ", ".join(
        f"{row['case']} {float(row['value']):.4g} {row['unit']}"
        for row in rows
        if row["case"] in ("copy", "matmul")
    )
    lines = [
        f"Here: {limits}. Milliseconds in {rows[-1]['dtype']}:\n",
        *_head(("operation", "shape"), (*columns, "library", "Triton reaches")),
    ]
    shares = {
        _line(row): f"{float(row['value']):.2f} {row['metric']}"
        for row in rows
        if row["metric"].startswith("of ") and row["backend"] == "triton"
    }
    for where, line in times(rows).items():
        cells = [f"{line[c][0]:.4g}" if c in line else "" for c in columns]
        library = "{:.4g} {}".format(*line["library"]) if "library" in line else ""
        lines.append(_row(*where, *cells, library, shares.get(where, "")))
    if whole := totals(rows):
        lines.append("\nAll lines of an operation together, in times of its kernel:\n")
        others = ("eager", "compiled", "library")
        lines += _head(["operation"], others)
        for name, line in whole.items():
            ratios = [f"{line[c] / line['Triton']:.2f}" if c in line else "" for c in others]
            lines.append(_row(name, *ratios))
    return lines
