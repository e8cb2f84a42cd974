"""Two processes make the same decisions as one, also with every setting of the recipe on."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from complexity_dit.config import ObjectiveConfig, OptimConfig, TrainConfig
from support.outcomes import losses_of, rows_of
from support.processes import torchrun


def with_every_knob(run: TrainConfig) -> TrainConfig:
    """A run whose every random draw and every decision must agree between processes."""
    shape = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2}
    return dataclasses.replace(
        run,
        steps=15,
        model=dataclasses.replace(
            run.model, token_drop_rate=0.5, auxiliary_layer=1, overrides=shape
        ),
        objective=ObjectiveConfig(
            label_dropout={"style": 0.1, "genre": 0.3}, auxiliary_weight=0.25
        ),
        optim=OptimConfig(
            name="muon", lr=1e-3, muon_lr=1e-2, warmup_steps=2, spike_factor=1.0, spike_window=4
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [False, True])
def test_two_processes_match_one(small_run: TrainConfig, tmp_path: Path, knobs: bool) -> None:
    run = with_every_knob(small_run) if knobs else small_run
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(dataclasses.asdict(run)))
    for processes in (1, 2):
        torchrun(
            processes, "-m", "complexity_dit", "train", "--config", config,
            "--out", tmp_path / str(processes),
        )  # fmt: skip
    assert losses_of(tmp_path / "1") == pytest.approx(losses_of(tmp_path / "2"), rel=1e-4)
    one, two = ([row["skipped"] for row in rows_of(tmp_path / n)] for n in ("1", "2"))
    assert one == two
    assert ("1" in one) == knobs
