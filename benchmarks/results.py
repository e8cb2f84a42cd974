"""The result file: a row is a number with the command, hardware, versions and commit behind it."""

import csv
import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

FIELDS = (
    "date", "bench", "case", "metric", "value", "unit", "command", "hardware", "threads",
    "torch", "python", "commit",
)  # fmt: skip


def hardware():
    """The GPU's name, else the CPU's as the system reports it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def commit():
    """Short commit of the code that ran, with `+` when files differed from it."""
    here = Path(__file__).parent

    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if dirty else "")


def append_rows(path, bench, rows):
    """Add rows {case, metric, value, unit} to a CSV, creating it with its header."""
    path = Path(path)
    about = {
        "date": datetime.date.today().isoformat(),
        "bench": bench,
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for row in rows:
            value = row["value"]
            text = f"{value:.6g}" if isinstance(value, float) else value
            writer.writerow(about | row | {"value": text})
