"""The files that a training of images leaves, for tests that compare runs."""

import csv
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from inl_core.run.checkpoints import latest_checkpoint


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file, or of the loss curve of a run's folder."""
    path = Path(path)
    with (path / "train_log.csv" if path.is_dir() else path).open(newline="") as file:
        return list(csv.DictReader(file))


def losses_of(run: str | Path) -> list[float]:
    return [float(row["loss"]) for row in rows_of(run)]


def last_checkpoint(run: str | Path) -> Path:
    newest = latest_checkpoint(Path(run) / "checkpoints")
    assert newest is not None
    return newest


def tensor_files(folder: Path) -> dict[str, dict[str, bytes]]:
    """The bytes of the tensors in all safetensors files of a folder, by file and name."""
    return {
        str(path.relative_to(folder)): {k: v.tobytes() for k, v in load_file(path).items()}
        for path in folder.rglob("*.safetensors")
    }


def outcome(run: str | Path) -> dict[str, Any]:
    """The bits of a run: its last checkpoint and its loss curve."""
    files = tensor_files(last_checkpoint(run))
    assert len(files) >= 3
    return files | {"curve": (Path(run) / "train_log.csv").read_bytes()}
