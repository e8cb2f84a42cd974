"""Two trainers on one folder: one trains, the other says who holds it, where and since when."""

import os
import re
import socket
import subprocess
import sys

import pytest

from inl_core.run.errors import UserError
from support.processes import ENVIRONMENT

# Holds a folder as a run does, until its input ends.
HOLDER = """
import sys
from pathlib import Path
from inl_core.run.checkpoints import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(package, tmp_path):
    """Another process that holds `tmp_path/run`."""
    script = HOLDER
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_trainer_is_told_who_trains(package, holder, tmp_path, resumed):
    began = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    told = rf"process {holder.pid} on {re.escape(socket.gethostname())} since {began}.*--out"
    for resume in ("none", "auto"):
        with pytest.raises(UserError, match=told):
            resumed(tmp_path / "run", resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_killed_holder_is_no_obstacle(package, holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    package.train(package.run(tmp_path / "run"))
    assert not (tmp_path / "run" / ".lock").exists()


def test_what_a_killed_run_left_is_cleared(package, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in (".step-00000004.partial", ".trainer.partial", ".step-00000002.removed"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "half").write_text("of it")
    config = package.run(tmp_path / "run")
    config.resume = "auto"
    package.train(config)
    assert [p.name for p in (tmp_path / "run").rglob(".*")] == []
