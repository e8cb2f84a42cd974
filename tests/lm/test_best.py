"""The checkpoint of the lowest held-out loss: kept, and made the model."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from complexity_lm.config import TrainConfig
from complexity_lm.train import train
from complexity_lm.trainer import LMTrainer
from inl_core.run.checkpoints import all_checkpoints, latest_checkpoint
from inl_core.run.errors import RunStopped, UserError
from support.kills import before_step
from support.outcomes import rows_of


def outcome(run: str | Path) -> tuple:
    checkpoint = latest_checkpoint(Path(run) / "checkpoints")
    assert checkpoint is not None
    weights = (checkpoint / "model.safetensors").read_bytes()
    return checkpoint.name, weights, (Path(run) / "train_log.csv").read_text()


@pytest.fixture
def worsening(small_run) -> Iterator[TrainConfig]:
    """A run whose held-out loss rises by half a nat a step: the best checkpoint is its first."""
    real = LMTrainer.prediction_step

    def prediction_step(self, *arguments, **named):
        loss, *others = real(self, *arguments, **named)
        return loss + 0.5 * self.state.global_step, *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "prediction_step", prediction_step)
        yield dataclasses.replace(
            small_run, eval_every=2, checkpoint_every=3, keep_last=1, keep_best=True
        )


def test_the_best_checkpoint_outlives_a_signal_and_becomes_the_model(
    worsening, tmp_path, monkeypatch
):
    straight = dataclasses.replace(worsening, out=str(tmp_path / "straight"))
    train(straight)
    before_step("lm", 6, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch.setattr)
    with pytest.raises(RunStopped):
        train(worsening)
    monkeypatch.undo()
    run = Path(worsening.out)
    assert [path.name[-1] for path in all_checkpoints(run / "checkpoints")] == ["2", "6"]
    model = train(dataclasses.replace(worsening, resume="auto"))
    losses = {int(row["step"]): float(row["loss"]) for row in rows_of(run / "heldout_log.csv")}
    assert min(losses, key=losses.__getitem__) == 2 < max(losses) == 8
    for out in (run, Path(straight.out)):
        best, last = all_checkpoints(out / "checkpoints")
        assert (best.name, last.name) == ("step-00000002", "step-00000008")
        assert (out / "model" / "model.safetensors").read_bytes() == (
            best / "model.safetensors"
        ).read_bytes()
        result = json.loads((out / "result.json").read_text())
        assert (result["step"], result["tokens_trained"]) == (2, 2 * 4 * 24)
    assert outcome(run) == outcome(straight.out)
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "tokenizer.json", "training.json"} < names
    assert names.isdisjoint({"trainer_state.json", "optimizer.pt", "run.json", "SHA256SUMS"})


def test_keep_best_needs_measurements(small_run):
    with pytest.raises(UserError, match="set eval_every above 0"):
        dataclasses.replace(small_run, keep_best=True, eval_every=0)
    data = dataclasses.replace(small_run.data, holdout=0)
    with pytest.raises(UserError, match="keep_best needs held-out text"):
        train(dataclasses.replace(small_run, keep_best=True, data=data))


def test_a_best_checkpoint_that_was_removed_is_no_longer_the_best(worsening, caplog):
    train(dataclasses.replace(worsening, steps=4))
    run = Path(worsening.out)
    best, _ = all_checkpoints(run / "checkpoints")
    shutil.rmtree(best)
    train(dataclasses.replace(worsening, resume="auto"))
    assert "the best checkpoint, of step 2, is gone" in caplog.text
    assert json.loads((run / "result.json").read_text())["step"] == 6  # the first after step 4
