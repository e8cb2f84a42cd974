"""The result file: one row per number, with its command, hardware, versions and commit."""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

FIELDS = (
    "date", "bench", "case", "shape", "dtype", "backend", "metric", "value", "unit", "command",
    "hardware", "threads", "torch", "triton", "python", "commit",
)  # fmt: skip
ROOMS = {path.stem: path.parent.name for path in Path(__file__).parents[1].glob("*/*.py")}


def current_command(recorded):
    """A recorded command as it is spelled today.

    Rows from before the scripts had folders name them `python benchmarks/bench_ops.py`, which is
    `python -m benchmarks.speed.bench_ops` now. A script that is gone keeps its recorded name.
    """
    old = re.match(r"python benchmarks/(\w+)\.py", recorded)
    if not old or old[1] not in ROOMS:
        return recorded
    return f"python -m benchmarks.{ROOMS[old[1]]}.{old[1]}{recorded[old.end() :]}"


def made_by(rows):
    """The sentence below a table: command, commits and machines of its rows."""
    run = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    machines = "; ".join(
        dict.fromkeys(
            f"{row['hardware']}, {row['threads']} threads, torch {row['torch']}, "
            f"Python {row['python']}"
            for row in rows
        )
    )
    return f"`{run['command']}`, commit {commits}, {run['date']}: {machines}."


def hardware(device=None):
    """Name of the GPU, or of the CPU as the system reports it; None is the GPU if there is one."""
    if torch.cuda.is_available() and torch.device(device or "cuda").type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def commit():
    """Short commit of the code that ran, with `+` if tracked files differ from it.

    A copy of the code without its history takes the commit from the variable COMMIT.
    """

    def git(*arguments):
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    # Rows added by a series of runs are results of this commit, not changes to it.
    code = (":(top)", ":(top,exclude)benchmarks/*.csv")
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    name = git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    return name or os.environ.get("COMMIT") or "none"


def command():
    """The command that started this process, without paths of the machine."""
    module = sys.modules["__main__"].__spec__
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def dtype_of(mixed_precision):
    """The column `dtype` for a training with this `mixed_precision`."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision, "float32")


def triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def as_rows(values, case, **about):
    """Rows of one case from {metric: (value, unit)}; `about` has other columns."""
    about = {"dtype": "float32", "case": case, **about}
    return [about | {"metric": m, "value": v, "unit": u} for m, (v, u) in values.items()]


def format_values(values):
    """{metric: (value, unit)} as one line of text."""
    return ", ".join(
        f"{metric} {value:.5g} {unit}".rstrip() for metric, (value, unit) in values.items()
    )


def append_rows(path, bench, rows, device=None, **columns):
    """Append rows to a CSV, which is created with its header if it does not exist.

    Args:
        path: The CSV.
        bench: Name of the benchmark.
        rows: Dictionaries with `case`, `metric`, `value` and `unit`, and optionally `shape`,
            `dtype` and `backend`.
        device: Device whose name is recorded; None is the GPU if there is one.
        columns: Columns that the caller knows better than this process at its end, such as the
            commit that a long run started from or a command without paths of the machine.

    Raises:
        ValueError: If the file has other columns.
    """
    path = Path(path)
    about = {
        "date": datetime.date.today().isoformat(),
        "bench": bench,
        "command": command(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
        **columns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh and (header := path.read_text().partition("\n")[0]) != ",".join(FIELDS):
        raise ValueError(f"{path} has the columns {header}, expected {','.join(FIELDS)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            value = row["value"]
            text = f"{value:.6g}" if isinstance(value, float) else value
            writer.writerow(about | row | {"value": text})


def run_missing(bench, run, cases, known, options, command, device=None):
    """Run the cases that `known` lacks; print each result and add it to `known` and to the rows.

    Args:
        bench: That of the rows.
        run: Function that returns the result of a case.
        cases: (case, arguments of `run`, columns of the rows) in order.
        known: {case: {metric: value}}.
        options: `minutes`, after which no run begins, and `rows`, the CSV or None.
        command: That of the rows.
        device: Likewise.
    """
    started_from, begin = commit(), time.monotonic()
    for case, arguments, columns in cases:
        if case in known or time.monotonic() - begin > 60 * options.minutes:
            continue
        result = run(*arguments)
        print(f"{case}: {format_values(result)}", flush=True)
        known[case] = {metric: value for metric, (value, _) in result.items()}
        if options.rows:
            rows = as_rows(result, case, **columns)
            append_rows(options.rows, bench, rows, device, command=command, commit=started_from)


def read_rows(path):
    """All rows as dictionaries of strings; an empty list if the file does not exist."""
    if not Path(path).exists():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))
