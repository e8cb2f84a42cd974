"""How a run ends early and goes on: signals, the lock on its folder, which checkpoints stay."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from complexity_dit.training.batches import StepBatches
from complexity_dit.training.train import StopRequest, train
from inl_core.run.checkpoints import (
    LOCK_FILE,
    all_checkpoints,
    drop_old_checkpoints,
    latest_checkpoint,
    lock_folder,
)
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import RunStopped, UserError


def outcome(run: Path) -> dict[str, bytes]:
    last = latest_checkpoint(run / "checkpoints")
    found = {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*.safetensors")}
    return found | {"curve": (run / "train_log.csv").read_bytes()}


def signal_at(monkeypatch, step: int, number: signal.Signals) -> None:
    real = StepBatches.__getitem__

    def item(self, index):
        if index == step - 1:
            os.kill(os.getpid(), number)
        return real(self, index)

    monkeypatch.setattr(StepBatches, "__getitem__", item)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on_bit_identically(
    small_run, tmp_path, monkeypatch, number, status
):
    straight = dataclasses.replace(small_run, out=str(tmp_path / "straight"))
    train(straight)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 6, number)
        with pytest.raises(RunStopped, match=rf"{number.name} after step 6 of 8.*step-00000006.*"
                           "--resume auto") as stop:  # fmt: skip
            train(small_run)
    assert stop.value.exit_status == status
    assert signal.getsignal(number) is before
    run = Path(small_run.out)
    assert not (run / "pipeline").exists()
    assert not (run / LOCK_FILE).exists()
    train(dataclasses.replace(small_run, resume="auto"))
    assert outcome(run) == outcome(tmp_path / "straight")


def test_a_signal_at_the_last_step_finds_a_finished_run(small_run, monkeypatch):
    signal_at(monkeypatch, small_run.steps, signal.SIGTERM)
    assert train(small_run).is_dir()


def test_the_second_interrupt_does_not_wait():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a cluster and a launcher both send it
        assert stop.number == signal.SIGTERM
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


OTHER_RUN = """
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("busy")
file.write("process 4711 on elsewhere")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_folder(small_run, tmp_path):
    run = Path(small_run.out)
    run.mkdir()
    command = [sys.executable, "-c", OTHER_RUN, str(run / LOCK_FILE)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        for resume in ("none", "auto"):
            with pytest.raises(UserError, match=r"another run, process 4711 .*--out"):
                train(dataclasses.replace(small_run, resume=resume))
        assert [p.name for p in run.iterdir()] == [LOCK_FILE]
        other.kill()
    # Its lock died with it; the file that it left is no obstacle.
    with lock_folder(run):
        assert subprocess.run(command, capture_output=True).stderr == b"busy\n"
        # Last, because a process that opens and closes the file gives its own lock up.
        assert f"process {os.getpid()} on " in (run / LOCK_FILE).read_text()
    assert not any(run.iterdir())


def test_a_run_that_comes_to_nothing_leaves_no_folder(small_run):
    data = dataclasses.replace(small_run.data, source="imagefolder:/nowhere")
    with pytest.raises(UserError, match="nowhere"):
        train(dataclasses.replace(small_run, data=data))
    assert not Path(small_run.out).exists()


def test_keep_every_outlives_keep_last(tmp_path):
    for step in (100, 150, 200, 250, 300):
        (tmp_path / f"step-{step:08d}").mkdir()
    drop_old_checkpoints(tmp_path, keep_last=1, keep_every=100)
    assert [int(p.name[5:]) for p in all_checkpoints(tmp_path)] == [100, 200, 300]
    drop_old_checkpoints(tmp_path, keep_last=0, keep_every=0)
    assert len(all_checkpoints(tmp_path)) == 3
    drop_old_checkpoints(tmp_path, keep_last=2, keep_every=0)
    assert [int(p.name[5:]) for p in all_checkpoints(tmp_path)] == [200, 300]


def test_checkpoints_to_keep_are_made_between_the_others(small_run):
    train(dataclasses.replace(small_run, checkpoint_every=4, keep_every=3, keep_last=1))
    kept = all_checkpoints(Path(small_run.out) / "checkpoints")
    assert [int(p.name[5:]) for p in kept] == [3, 6, 8]


def test_going_back_asks_for_a_decision(small_run, tmp_path):
    train(dataclasses.replace(small_run, keep_last=0))
    first = all_checkpoints(Path(small_run.out) / "checkpoints")[0]
    with pytest.raises(UserError, match=r"later checkpoints than step-00000004.*step-00000008"):
        train(dataclasses.replace(small_run, resume=str(first)))
    branch = dataclasses.replace(small_run, resume=str(first), out=str(tmp_path / "branch"))
    train(branch)
    assert (
        outcome(tmp_path / "branch")["model.safetensors"]
        == (outcome(Path(small_run.out))["model.safetensors"])
    )


def test_a_curve_cut_short_by_a_kill(tmp_path):
    path = tmp_path / "curve.csv"
    CsvLog(path, ("step", "loss"), 0).write([(1, 0.5), (2, 0.25), (3, 0.125)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\n1")  # half of "10,..."
    assert CsvLog(path, ("step", "loss"), 2).steps == {1, 2}
    assert path.read_bytes() == whole[: whole.index(b"3,")]


def test_numbers_out_of_range_are_refused(small_run):
    for name, value in (("steps", 0), ("checkpoint_every", 0), ("keep_every", -1)):
        with pytest.raises(UserError, match=f"{name} {value} must be at least"):
            train(dataclasses.replace(small_run, **{name: value}))
