"""What several tests of the training share."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from complexity_dit.config import TrainConfig
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.train import train
from inl_core.run.checkpoints import all_checkpoints
from support.outcomes import outcome, rows_of


@pytest.fixture
def on_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[int, dict[str, Tensor]], object]], None]:
    """Call a function with the index of a step and its batch, which it may change in place."""

    def patch(change: Callable[[int, dict[str, Tensor]], object]) -> None:
        make = StepBatches.__getitem__

        def item(self: StepBatches, step: int) -> dict[str, Tensor]:
            batch = make(self, step)
            change(step, batch)
            return batch

        monkeypatch.setattr(StepBatches, "__getitem__", item)

    return patch


@pytest.fixture
def resumed_as_straight(tmp_path: Path) -> Callable[[TrainConfig], list[dict[str, str]]]:
    """Train at once, and again from the middle checkpoint: the same bits. Returns the curve."""

    def check(config: TrainConfig) -> list[dict[str, str]]:
        config = dataclasses.replace(config, checkpoint_every=config.steps // 2, keep_last=0)
        straight, stopped = (
            dataclasses.replace(config, out=str(tmp_path / name))
            for name in ("straight", "stopped")
        )
        train(straight)
        # As if killed after the first checkpoint: later rows of the curve are written again.
        shutil.copytree(straight.out, stopped.out)
        shutil.rmtree(all_checkpoints(Path(stopped.out) / "checkpoints")[1])
        shutil.rmtree(Path(stopped.out) / ("adapter" if config.lora.rank else "pipeline"))
        train(dataclasses.replace(stopped, resume="auto"))
        assert outcome(straight.out) == outcome(stopped.out)
        rows = rows_of(straight.out)
        assert len(rows) == config.steps
        return rows

    return check
