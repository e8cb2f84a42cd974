"""Stopping and resuming: signals, the lock of the run folder, and the checkpoints that are kept."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from complexity_dit.training.train import train
from inl_core.run.checkpoints import all_checkpoints, drop_old_checkpoints
from inl_core.run.csv_log import CsvLog
from inl_core.run.errors import UserError
from inl_core.run.folders import LOCK_FILE, lock_folder
from inl_core.run.stopping import StopRequest
from support.outcomes import outcome


def test_the_second_interrupt_stops_at_once():
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


def test_a_second_run_in_the_same_folder_is_refused(small_run, tmp_path):
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
    # Its lock died with it; the file that it left does not matter.
    with lock_folder(run):
        assert subprocess.run(command, capture_output=True).stderr == b"busy\n"
        # Last, because a process that opens and closes the file gives its own lock up.
        assert f"process {os.getpid()} on " in (run / LOCK_FILE).read_text()
    assert not any(run.iterdir())


def test_a_run_that_fails_at_once_leaves_no_folder(small_run):
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


def test_checkpoints_to_keep_are_saved_in_addition(small_run):
    train(dataclasses.replace(small_run, checkpoint_every=4, keep_every=3, keep_last=1))
    kept = all_checkpoints(Path(small_run.out) / "checkpoints")
    assert [int(p.name[5:]) for p in kept] == [3, 6, 8]


def test_going_back_needs_another_folder(small_run, tmp_path):
    train(dataclasses.replace(small_run, keep_last=0))
    first = all_checkpoints(Path(small_run.out) / "checkpoints")[0]
    with pytest.raises(UserError, match=r"later checkpoints than step-00000004.*step-00000008"):
        train(dataclasses.replace(small_run, resume=str(first)))
    branch = dataclasses.replace(small_run, resume=str(first), out=str(tmp_path / "branch"))
    train(branch)
    assert outcome(branch.out)["model.safetensors"] == outcome(small_run.out)["model.safetensors"]


def test_a_half_written_row_is_dropped(tmp_path):
    path = tmp_path / "curve.csv"
    CsvLog(path, ("step", "loss"), 0).write([(1, 0.5), (2, 0.25), (3, 0.125)])
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + b"\n1")  # half of "10,..."
    assert CsvLog(path, ("step", "loss"), 2).steps == {1, 2}
    assert path.read_bytes() == intact[: intact.index(b"3,")]


def test_numbers_out_of_range_are_refused(small_run):
    wrong = (("steps", 0), ("checkpoint_every", 0), ("keep_every", -1), ("evaluate_num_images", 1))
    for name, value in wrong:
        with pytest.raises(UserError, match=f"{name} is {value}; expected at least"):
            train(dataclasses.replace(small_run, **{name: value}))
