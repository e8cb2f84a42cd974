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
from complexity_dit.errors import UserError
from complexity_dit.launch import train_on_all_cores
from complexity_dit.train import train


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


def test_the_processes_of_the_demo_train_as_one_does(
    small_run: TrainConfig, tmp_path: Path
) -> None:
    train_on_all_cores(dataclasses.replace(small_run, out=str(tmp_path / "2")), processes=2)
    train(dataclasses.replace(small_run, out=str(tmp_path / "1")))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


def test_what_stops_a_process_is_said_once(small_run: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(UserError, match="exists; go on with --resume auto"):
        train_on_all_cores(dataclasses.replace(small_run, out=str(tmp_path / "run")), processes=2)
