"""CSV log that stays exact across kills and resumes."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inl_core.run.errors import UserError
from inl_core.run.files import atomic_file, open_regular, read_text

_MAX_BYTES = 2**30  # ten million steps


class CsvLog:
    """CSV file whose first column is the step; opening it drops the rows after the resumed step.

    Args:
        path: The file.
        fields: Column names, "step" first.
        start_step: Step of the checkpoint that the run resumes from. Later rows are removed,
            because the run repeats those steps.

    Raises:
        UserError: The file exists and is not such a log.
    """

    def __init__(self, path: Path, fields: Sequence[str], start_step: int) -> None:
        self.path = path
        rows = _complete_rows(path, fields) if os.path.lexists(path) else []
        rows = [row for row in rows if int(row["step"]) <= start_step]
        self.steps = {int(row["step"]) for row in rows}
        with atomic_file(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows, values in the order of the fields; they are on disk when this returns."""
        rows = list(rows)
        with open_regular(self.path, "a", newline="") as file:
            csv.writer(file).writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        self.steps.update(int(row[0]) for row in rows)


def read_columns(path: Path, *fields: str) -> list[list[float]]:
    """The values of some columns of a log, one list per column.

    Raises:
        UserError: The file is not a log with these columns.
    """
    try:
        lines = read_text(path, _MAX_BYTES).rpartition("\n")[0].splitlines()
        rows = [[float(row[field]) for field in fields] for row in csv.DictReader(lines)]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path} is not a log of a run ({error})") from error
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in fields]


def _complete_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Rows up to the last line end: a kill may have cut "120" to "1", which is also a step."""
    try:
        lines = read_text(path, _MAX_BYTES).rpartition("\n")[0].splitlines()
        rows = list(reader := csv.DictReader(lines, strict=True))
        # An older version may have had fewer columns, never others.
        for names in (reader.fieldnames or [], *rows):
            if not set(names) <= set(fields):
                raise ValueError(f"its columns are not {', '.join(fields)}")
        for row in rows:
            if None in row.values():
                raise ValueError(f"incomplete row {row}")
            int(row["step"])
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path} is not a log of such a run ({error}): move it away, or choose another --out"
        ) from error
    return rows
