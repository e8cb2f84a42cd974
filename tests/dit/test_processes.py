"""Several processes train as one does."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from complexity_dit.config import TrainConfig


def losses(run: Path) -> list[float]:
    with (run / "train_log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_processes_match_one(small_run: TrainConfig, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(small_run)))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for processes in ("1", "2"):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes,
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
            "-m", "complexity_dit", "train", "--config", str(config),
            "--out", str(tmp_path / processes),
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)
