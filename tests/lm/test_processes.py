"""Several processes train like one."""

import csv
import dataclasses
from pathlib import Path

import pytest
import yaml

from complexity_lm.config import TrainConfig
from support.processes import torchrun


def losses(run: Path) -> list[float]:
    with (run / "train_log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("num_loops", [1, 3])
def test_two_processes_match_one(small_run: TrainConfig, tmp_path: Path, num_loops: int) -> None:
    """With a loop: the same drawn numbers of repetitions; two processes recompute activations."""
    run = dataclasses.replace(
        small_run,
        steps=20,
        batch_size=8,
        checkpoint_every=20,
        eval_every=10,
        dynamics_every=10,
        optim=dataclasses.replace(small_run.optim, lr=1e-3),
        model=dataclasses.replace(
            small_run.model,
            dtype="float64",
            num_experts=2,
            num_loops=num_loops,
            overrides=small_run.model.overrides | {"num_hidden_layers": 3},
        ),
        loop_sampling="uniform" if num_loops > 1 else "fixed",
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(run)))
    for processes in (1, 2):
        torchrun(
            processes, "-m", "complexity_lm", "train", "--config", config,
            "--out", tmp_path / str(processes),
            "--gradient_checkpointing", str(num_loops > 1 and processes > 1).lower(),
        )  # fmt: skip
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 20
    assert one[-1] < one[0]
    assert one == pytest.approx(two, rel=1e-9)
    for name in ("heldout_log.csv", "dynamics.csv"):
        assert len((tmp_path / "2" / name).read_text().splitlines()) == len(
            (tmp_path / "1" / name).read_text().splitlines()
        )
