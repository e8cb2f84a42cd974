"""Processes that are killed: the others stop with a message, and nothing hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
from multiprocessing import Pipe

import pytest

from inl_core.run import checkpoints
from inl_core.run.errors import UserError
from inl_core.run.workers import report_dead_workers
from support.pictures import pictures, write_folder
from support.processes import ENVIRONMENT, python

BOUND = 400
"""Seconds: much more than a run of 8 steps needs, much less than the timeouts of torch."""

RANK = """
import dataclasses, importlib, os, signal, sys
from pathlib import Path
import yaml
from support.kills import before_step
from support.small_runs import dit_run, lm_run

kind, out, texts, victim = sys.argv[1:]

def die():
    print("DIES", os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == victim:
    before_step(kind, 6, die)
cli = importlib.import_module(f"complexity_{kind}.__main__")
config = dit_run(out) if kind == "dit" else lm_run(out, texts)
settings = Path(f"{out}.{os.environ['RANK']}.yaml")
settings.write_text(yaml.safe_dump(dataclasses.asdict(config)))
sys.argv = ["test", "train", "--config", str(settings)]
cli.main()
"""


EVALUATION = """
import importlib, os, signal, sys
from complexity_dit import __main__ as cli

if os.environ["RANK"] == sys.argv.pop():
    evaluation = importlib.import_module("complexity_dit.evaluation.evaluate")
    evaluation.collect = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main()
"""

# In a process of its own: torch reports a dead worker from a signal handler, which would raise
# anywhere in the process of the tests. Child processes that end afterwards must raise nothing.
LOADER = """
import os, signal, subprocess, sys
from pathlib import Path
from torch.utils.data import get_worker_info
from complexity_dit.training.batches import StepBatches
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.small_runs import dit_run

real = StepBatches.__getitem__
run = Path(sys.argv[1])

def item(self, step):
    if step == 6 and get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, step)

StepBatches.__getitem__ = item
try:
    train(dit_run(run, loader_workers=1))
except UserError as error:
    print(error)
    for _ in range(3):
        subprocess.run([sys.executable, "-c", ""], check=True)
    kept = error
StepBatches.__getitem__ = real
print(*(path.name for path in (run / "checkpoints").iterdir()))
train(dit_run(run, loader_workers=1, resume="auto"))
print("resumed")
"""


def message_of_the_survivor(command, victim, folder):
    """Run a command, whose last argument is the victim, in two processes: the other's output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = []
    try:
        for rank in range(2):
            of_rank = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            }  # fmt: skip
            with (folder / f"{rank}.txt").open("w") as output:
                both.append(
                    subprocess.Popen(
                        [sys.executable, "-c", *map(str, command), str(victim)],
                        env=os.environ | ENVIRONMENT | of_rank, stdout=output, stderr=output,
                    )
                )  # fmt: skip
        died = both[victim].wait(timeout=BOUND)
        assert died == -signal.SIGKILL, (folder / f"{victim}.txt").read_text()
        status = both[1 - victim].wait(timeout=BOUND)
    finally:
        for process in both:
            process.kill()
            process.wait()
    text = (folder / f"{1 - victim}.txt").read_text()
    assert status == 2, text
    assert "another process of this run no longer responds" in text
    assert "Traceback" not in text
    return text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_stops_and_says_how_to_resume(package, texts, tmp_path, victim):
    command = [RANK, package.name, tmp_path / "run", texts]
    assert "--resume auto" in message_of_the_survivor(command, victim, tmp_path)
    last = checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert last.name == "step-00000004"
    assert checkpoints.find_damage(last) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
def test_an_evaluation_stops(tmp_path, victim):
    folders = [write_folder(tmp_path / name, pictures(4, 1)) for name in ("a", "b")]
    command = [EVALUATION, "evaluate", folders[0], "--reference", folders[1]]
    command += ["--out", tmp_path / "result", "--weights", "random", "--cache", "false"]
    message = message_of_the_survivor(command, victim, tmp_path)
    assert "start the same command again" in message
    assert not (tmp_path / "result" / "result.json").exists()


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_reported(error, monkeypatch):
    ours, theirs = Pipe()
    theirs.close()

    def failing(*_):
        raise error

    monkeypatch.setattr(ours, "_recv", failing, raising=False)
    with pytest.raises(UserError, match=r"worker died.*--resume"), report_dead_workers():
        ours.recv()
    with pytest.raises(FileNotFoundError, match="gone"), report_dead_workers():
        raise FileNotFoundError("gone")  # as of a picture, in a worker


def test_a_killed_data_loader_worker_is_reported(tmp_path):
    printed = python("-c", LOADER, tmp_path / "run").stdout
    assert re.search(r"worker died \(DataLoader worker.*--resume", printed), printed
    assert printed.split()[-2:] == ["step-00000004", "resumed"]
