"""SIGTERM and Ctrl-C during a training save a checkpoint, for both packages."""

import os
import signal
from pathlib import Path

import pytest

from inl_core.run.errors import RunStopped
from inl_core.run.folders import LOCK_FILE
from support.kills import before_step


@pytest.fixture
def signal_at(package, monkeypatch):
    """Send a signal to this process in a step, counted from 1."""
    return lambda step, number: before_step(
        package.name, step, lambda: os.kill(os.getpid(), number), monkeypatch.setattr
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_is_bit_identical(
    package, resumed, signal_at, monkeypatch, tmp_path, number, status
):
    run, straight = tmp_path / "run", tmp_path / "straight"
    package.train(package.run(straight))
    before = signal.getsignal(number)
    signal_at(6, number)
    expected = rf"{number.name} after step 6 of 8.*step-00000006.*--resume auto"
    with pytest.raises(RunStopped, match=expected) as stop:
        package.train(package.run(run))
    assert stop.value.exit_status == status
    assert signal.getsignal(number) is before
    assert not any((run / name).exists() for name in ("pipeline", "model", LOCK_FILE))
    monkeypatch.undo()
    resumed(run)
    assert package.outcome(run) == package.outcome(straight)


def test_a_signal_at_the_last_step_finishes_the_run(package, signal_at, tmp_path):
    config = package.run(tmp_path / "run")
    signal_at(config.steps, signal.SIGTERM)
    assert package.train(config).is_dir()
    if package.name == "lm":  # the last of its files
        assert (Path(config.out) / "result.json").exists()
