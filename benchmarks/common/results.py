"""The result file: a row is a number with the command, hardware, versions and commit behind it."""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
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
    """Name of the GPU, or of the CPU as the system reports it; None asks for a GPU if there is."""
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
    """Short commit of the code that ran, with `+` when files differed from it.

    A copy of the code without its history takes the name from the variable COMMIT.
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

    # Rows that an hours-long series has added are results of this commit, not changes to it.
    code = (":(top)", ":(top,exclude)benchmarks/*.csv")
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    known = git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    return known or os.environ.get("COMMIT") or "none"


def command():
    """How this process was started, without paths of the machine."""
    module = sys.modules["__main__"].__spec__
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def dtype_of(mixed_precision):
    """The column `dtype` of a training with this `mixed_precision`."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision, "float32")


def triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def append_rows(path, bench, rows, device=None, **known):
    """Add rows to a CSV, creating it with its header; what is added is on disk on return.

    A row has `case`, `metric`, `value` and `unit`, and may have `shape`, `dtype` and `backend`.
    What the caller knows better than this process at its end (the commit a long run started from,
    a command without paths of the machine) is given by column.
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
        **known,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh and (header := path.read_text().partition("\n")[0]) != ",".join(FIELDS):
        raise ValueError(f"{path} has the columns {header}, expected {','.join(FIELDS)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for row in rows:
            value = row["value"]
            text = f"{value:.6g}" if isinstance(value, float) else value
            writer.writerow(about | row | {"value": text})


def read_rows(path):
    """All rows as dictionaries of strings; none if there is no file."""
    if not Path(path).exists():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))
