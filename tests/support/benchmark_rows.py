"""Rows of a result file, studies and command lines, for tests of the benchmarks."""

from pathlib import Path

from benchmarks.common.results import FIELDS
from benchmarks.study.ablation_study import read_study

ROOT = Path(__file__).parents[2]


def row(bench, case, metric, value, **columns):
    """A row as it is read from a result file."""
    named = {"bench": bench, "case": case, "metric": metric, "value": str(value)}
    defaults = {"command": "c", "hardware": "h", "commit": "1234567", "date": "2026-01-01"}
    return dict.fromkeys(FIELDS, "") | defaults | named | columns


def committed_study(name):
    """A study of configs/ablations."""
    return read_study(ROOT / f"configs/ablations/{name}.yaml")


def call(monkeypatch, script, *arguments):
    """Run the `main` of a script with these arguments."""
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    script.main()
