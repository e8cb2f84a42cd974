"""Limits of the operating system: a run says which one it meets, and does not wait."""

import os
import resource
import subprocess
import sys

import pytest

from inl_core.run.errors import UserError
from inl_core.run.workers import allow_open_files
from support.processes import ENVIRONMENT

FEW_FILES = """
import resource, sys
from pathlib import Path
from complexity_dit.training.train import train
from inl_core.run.errors import UserError
from support.small_runs import dit_run
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
try:
    train(dit_run(Path(sys.argv[1]), loader_workers=int(sys.argv[2])))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(("workers", "message"), [(2, "2 loader workers need 128"), (0, None)])
def test_few_open_files_do_not_make_a_run_wait(tmp_path, workers, message):
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, tmp_path / "run", str(workers)],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if message is not None:
        assert message in done.stderr
    else:
        assert done.returncode == 0 or "ulimit -n" in done.stderr


def test_the_limit_is_raised_as_far_as_it_may_be():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (70, before[1]))
        allow_open_files(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (96, before[1])
        with pytest.raises(UserError, match="fewer loader workers"):
            allow_open_files(before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
