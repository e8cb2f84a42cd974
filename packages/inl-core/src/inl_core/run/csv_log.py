"""A curve as a CSV file that is exact across kills and resumes."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file


class CsvLog:
    """A CSV whose first column is the step; opening it drops what lies beyond the resumed step.

    Args:
        path: The file.
        fields: Column names, "step" first.
        start_step: A resumed run repeats the steps after this one: their rows are removed.
    """

    def __init__(self, path: Path, fields: Sequence[str], start_step: int) -> None:
        self.path = path
        rows: list[dict[str, str]] = []
        if path.exists():
            # A kill may have cut the last line short, and "1" of "120" is a step too.
            rows = [row for row in _whole_rows(path, fields) if int(row["step"]) <= start_step]
        self.steps = {int(row["step"]) for row in rows}
        with atomic_file(path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows in the order of the fields; they are on disk when this returns."""
        rows = list(rows)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        self.steps.update(int(row[0]) for row in rows)


def _whole_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows that are there to their end; a file that is no such log is refused, not replaced."""
    try:
        # newline="" leaves line ends to the csv module, which knows those inside of quotes.
        with path.open(newline="", encoding="utf-8") as file:
            whole = file.read().rpartition("\n")[0].splitlines()
        rows = list(reader := csv.DictReader(whole, strict=True))
        # An older version may have had fewer columns, never others.
        for names in (reader.fieldnames or [], *rows):
            if not set(names) <= set(fields):
                raise ValueError(f"its columns are not {', '.join(fields)}")
        for row in rows:
            if None in row.values():
                raise ValueError(f"a row ends early, {row}")
            int(row["step"])
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path} is no log of such a run ({error}): move it away, or choose another --out"
        ) from error
    return rows
